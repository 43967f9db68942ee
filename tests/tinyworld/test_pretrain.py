import pytest
import torch

from tinyworld.corpus import Corpus
from tinyworld.pretrain import RECIPES, Recipe, Size, batch_loss, learning_rate, new_model, train
from tinyworld.tokenizer import build_tokenizer

SHORT = Recipe(stages=((2, {"score": 3}), (4, {"pair": 2, "tag": 1})), lr=1e-3, warmup=2, decay=2)


def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = train("judge", SHORT, tmp_path / "whole", seed=5)
    train("judge", SHORT, tmp_path / "halves", seed=5, stop_at=3)
    assert not (tmp_path / "halves" / "judge").exists()
    halves = train("judge", SHORT, tmp_path / "halves", seed=5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, halves.state_dict()[name]), name


def test_the_learning_rate_warms_up_stays_and_falls():
    recipe = Recipe(stages=((100, {"copy": 1}),), lr=1.0, warmup=10, decay=50)
    assert [learning_rate(recipe, s) for s in (0, 4, 9, 30, 50, 75, 99)] == [
        0.1,
        0.5,
        1.0,
        1.0,
        1.0,
        0.5,
        0.02,
    ]


def test_the_loss_does_not_depend_on_how_examples_are_batched():
    tokenizer = build_tokenizer()
    corpus, model = Corpus(tokenizer), new_model(tokenizer, 0, Size(layers=1))
    parts = [corpus.batches({"pair": 4, "score": 4}, 1, rank=r, ranks=n) for n in (1, 2, 4) for r in range(n)]
    sums = [sum(float(batch_loss(model, b)[0].detach()) for b in part) for part in parts]
    whole, halves, quarters = sums[0], sum(sums[1:3]), sum(sums[3:])
    assert abs(halves - whole) < 1e-3
    assert abs(quarters - whole) < 1e-3


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("judge", 0.67e6), ("judge-medium", 0.045e6), ("judge-small", 0.026e6), ("judge-tiny", 0.0125e6)],
)
def test_judges_are_of_four_sizes(name, parameters):
    size = RECIPES[name].size
    model = new_model(build_tokenizer(), 0, size)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.1)
    vocabulary, width = model.model.embed_tokens.weight.shape
    blocks = size.layers * (4 * width**2 + 3 * width * 2 * width + 2 * width)
    assert model.num_parameters() == vocabulary * width + blocks + width
    # Attention that starts out uniform learns nothing for long: a query must tell keys apart at every width.
    queries = model.model.layers[0].self_attn.q_proj.weight
    assert float(queries.detach().std() * width**0.5) == pytest.approx(0.9, rel=0.05)
