"""Loading policies and critics. Everything stays in eval mode: dropout would make ratio and KL noisy.

("The N+ Implementation Details", arXiv 2403.17031, detail 14: dropout off in policy, reference and critic.)
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from policy_trainer.config import TrainingConfig
from policy_trainer.logprobs import (
    has_plain_head,
    logprobs_from_hidden,
    response_hidden,
    token_logprobs,
)
from rlaif.chat import ensure_pad_token, ensure_template
from rlaif.errors import ConfigError, ModelError
from rlaif.lora import add_adapters, check_tied, imported
from rlaif.models import ModelRef, reason, require_pretrained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadedPolicy(NamedTuple):
    """A causal language model with its tokenizer (which has a chat template and a PAD that is not EOS)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class TrainedPolicy(NamedTuple):
    """The policy of a run, and what belongs to it.

    Attributes:
        model: in eval mode, with its adapters in it if it has any.
        tokenizer: its own.
        base: with adapters, the same model without them; it shares all weights. Otherwise None.
        adapters: peft's view of `model`; None if the weights themselves are trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel | None = None
    adapters: PeftModel | None = None

    @property
    def saved(self) -> PreTrainedModel | PeftModel:
        """What a checkpoint keeps: the adapters alone, or the model."""
        return self.adapters or self.model

    def merged(self) -> PreTrainedModel:
        """The model as an ordinary one, its adapters added into the weights, which are those of `base` too."""
        if self.adapters is not None:
            self.adapters.merge_and_unload()
        return self.model


def default_device() -> torch.device:
    """The current GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_trained(config: TrainingConfig, checkpoint: Path | None) -> TrainedPolicy:
    """The policy of a run, as it begins or as its checkpoint has it.

    Args:
        config: the run.
        checkpoint: a folder written by `save_checkpoint`; None for a fresh run, which draws new adapters from its seed.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: adapters cannot be put into it.
    """
    if not config.use_peft:
        path = config.model_name_or_path if checkpoint is None else str(checkpoint)
        template = config.chat_template if checkpoint is None else None
        model, tokenizer = load_policy(path, dtype=config.dtype, chat_template=template)
        base = adapters = None
    else:
        # Adapters change a model that a checkpoint does not have.
        model, tokenizer = load_policy(
            config.model_name_or_path, dtype=config.dtype, chat_template=config.chat_template
        )
        base = twin(model.requires_grad_(False))
        if checkpoint is None:
            torch.manual_seed(config.seed)
            adapters = add_adapters(model, config, task="CAUSAL_LM")
        else:
            adapters = imported().PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
        model.train(False)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return TrainedPolicy(model, tokenizer, base, adapters)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own around the same weights: what is put between the modules of one is not in the other."""
    weights: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the inputs of the model's layers for the backward pass, and compute each layer again there.

    What `gradient_checkpointing_enable` of transformers does for models in training mode, for one in eval mode, which
    has no dropout.

    Raises:
        ConfigError: transformers does not know the layers of this architecture.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError("--gradient_checkpointing is not supported by this architecture: leave it out")
    for layer in layers:
        again = partial(recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = again


def load_policy(
    model_name_or_path: str,
    *,
    dtype: str = "float32",
    chat_template: str | None = None,
    device: torch.device | None = None,
) -> LoadedPolicy:
    """Load a causal language model in eval mode.

    Args:
        model_name_or_path: a path, `hf:NAME_OR_PATH` or `tinyworld:policy` (`rlaif.models.ModelRef`). Where that holds
            LoRA adapters, as a checkpoint of a run with `use_peft` does, they are added into the model they belong to.
        dtype: `float32` or `bfloat16`.
        chat_template: name of a built-in template or a file; None keeps the tokenizer's own.
        device: where the model goes; `default_device()` if None.

    Raises:
        ModelError: there is no such model, or it is not a causal language model.
        ConfigError: it holds adapters and peft is not installed.
    """
    loaded = _load(model_name_or_path, dtype, device)
    ensure_template(loaded.tokenizer, chat_template)
    return loaded


def load_reference(
    model_name_or_path: str, policy: PreTrainedTokenizerBase, *, dtype: str = "float32"
) -> PreTrainedModel:
    """Load a model that reads the token ids that a policy has sampled.

    Args:
        model_name_or_path: as for `load_policy`.
        policy: the policy's tokenizer.
        dtype: `float32` or `bfloat16`.

    Raises:
        ModelError: it cannot be loaded, or other tokens have these ids: there is no KL to it.
    """
    reference = _load(model_name_or_path, dtype, None)
    if reference.tokenizer.get_vocab() != policy.get_vocab():
        raise ModelError(
            f"the policy and its reference {model_name_or_path} have different vocabularies: there is no KL between "
            "them; name another --ref_model"
        )
    return reference.model


def _load(model_name_or_path: str, dtype: str, device: torch.device | None) -> LoadedPolicy:
    """See `load_policy`; the tokenizer may have no chat template."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar per shard and save would bury the progress of training
    model, tokenizer = _pretrained(model_name_or_path, DTYPES[dtype])
    ensure_pad_token(tokenizer)
    # Our own tensors never hold PAD, but whoever loads the saved model may pad with it.
    _grow_vocabulary(model, len(tokenizer))
    model.eval()
    return LoadedPolicy(model.to(device or default_device()), tokenizer)


def _pretrained(model_name_or_path: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder or a hub name; adapters are merged into their model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.peft_utils import find_adapter_config_file

    path = ModelRef.parse(model_name_or_path).pretrained_path()
    require_pretrained(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        adapters = find_adapter_config_file(path)
        described = None if adapters else AutoConfig.from_pretrained(path)
        _require_no_reward_model(model_name_or_path, path, getattr(described, "architectures", None))
        if adapters is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
            if missing := sorted(loaded[1]["missing_keys"]):
                raise ModelError(
                    f"{model_name_or_path!r} is no causal language model: it lacks weights, such as {missing[0]}"
                )
            return loaded[0], tokenizer
        base = json.loads(Path(adapters).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, KeyError) as err:
        raise _cannot_load(model_name_or_path, err) from err
    if not base:
        raise ModelError(
            f"{adapters} does not say what the adapters belong to: set base_model_name_or_path in it"
        )
    try:
        model, _ = _pretrained(base, dtype)
    except ModelError as err:
        raise ModelError(f"{model_name_or_path!r} holds adapters to another model: {err}") from err
    # A run that added a PAD has trained beside its row.
    _grow_vocabulary(model, len(tokenizer))
    peft = imported(f"the adapters in {path}")
    try:
        adapted = peft.PeftModel.from_pretrained(model, path)
    except (OSError, ValueError, RuntimeError) as err:
        raise _cannot_load(model_name_or_path, err) from err
    check_tied(model)
    model = adapted.merge_and_unload()
    # What is trained further, and its adapters, start from here and not from the bare model.
    model.name_or_path = model.config.name_or_path = path
    return model.requires_grad_(True), tokenizer


def _require_no_reward_model(model_name_or_path: str, path: str, architectures: Sequence[str] | None) -> None:
    """Where embeddings are tied, a classifier lacks no weight of a language model, and what it samples is noise."""
    classifies = any(name.endswith("ForSequenceClassification") for name in architectures or ())
    if classifies or (Path(path) / "reward_model.json").exists():
        raise ModelError(
            f"{model_name_or_path!r} is a reward model and no policy: name a causal language model, and serve this one "
            "with rlaif serve"
        )


def _cannot_load(model_name_or_path: str, err: Exception) -> ModelError:
    return ModelError(f"cannot load {model_name_or_path!r} as a causal language model: {reason(err)}")


@torch.no_grad()
def _grow_vocabulary(model: Any, size: int) -> None:
    """Add the embedding rows that are missing, each the mean of the others: policy and reference must get the same."""
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight[old:] = embedding.weight[:old].mean(dim=0)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: those of the model's generation config, and the tokenizer's EOS.

    Both, because chat templates write the tokenizer's, also where the generation config is that of the base model.

    Raises:
        ModelError: neither names one, so no response could ever end.
    """
    found = declared_eos(model, tokenizer)
    if not found:
        raise ModelError("the model has no EOS token: set eos_token_id in its generation_config.json")
    return found


def declared_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """See `eos_token_ids`; empty if there are none."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    return tuple(dict.fromkeys(i for i in (*several, tokenizer.eos_token_id) if i is not None))


class ValueModel(nn.Module):
    """A transformer trunk with a scalar head: V(s) of the state before each response token."""

    def __init__(self, trunk: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        # All values start at 0, so the first advantages are discounted rewards and not noise.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_len: int) -> Tensor:
        """Values of the states from which each response token was sampled: (N, P + R) -> (N, R) float32."""
        hidden = response_hidden(self.trunk, input_ids, attention_mask, response_len)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values.float()


class Evaluation(NamedTuple):
    """What policy and critic say of a batch; shapes (N, R), see `TokenLogprobs`. No values without a critic."""

    logprobs: Tensor
    values: Tensor | None
    entropy: Tensor | None


class ActorCritic(nn.Module):
    """The policy and what gives values: a critic of its own, a linear head on the policy's trunk, or nothing."""

    def __init__(self, policy: PreTrainedModel, critic: ValueModel | nn.Linear | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_len: int,
        temperature: float,
        *,
        with_entropy: bool = False,
    ) -> Evaluation:
        """Log-probabilities at the sampling temperature and values of every response position."""
        if isinstance(self.critic, nn.Linear):
            hidden = response_hidden(self.policy.base_model, input_ids, attention_mask, response_len)
            targets = input_ids[:, -response_len:]
            read = logprobs_from_hidden(self.policy, hidden, targets, temperature, with_entropy=with_entropy)
            return Evaluation(read.logprobs, self.critic(hidden.float()).squeeze(-1), read.entropy)
        read = token_logprobs(
            self.policy, input_ids, attention_mask, response_len, temperature, with_entropy=with_entropy
        )
        return Evaluation(read.logprobs, self.values(input_ids, attention_mask, response_len), read.entropy)

    def values(self, input_ids: Tensor, attention_mask: Tensor, response_len: int) -> Tensor | None:
        """Values of every response position without the policy's log-probabilities: (N, R), or None."""
        if isinstance(self.critic, nn.Linear):
            hidden = response_hidden(self.policy.base_model, input_ids, attention_mask, response_len)
            values: Tensor = self.critic(hidden.float()).squeeze(-1)
        elif self.critic is None:
            return None
        else:
            values = self.critic(input_ids, attention_mask, response_len)
        return values


@torch.no_grad()
def hidden_size(model: PreTrainedModel) -> int:
    """Width of the trunk's output, as it is: OPT-350m's is another than its config's `hidden_size`."""
    ids = torch.tensor([[0, 1]], device=model.device)  # any will do
    return response_hidden(model.base_model, ids, torch.ones_like(ids), response_len=1).shape[-1]


def build_value_head(policy: PreTrainedModel) -> nn.Linear:
    """A scalar head for the policy's own trunk; all values start at 0, as in `ValueModel`.

    Raises:
        ModelError: the trunk's output is not what the policy's head reads.
    """
    if not has_plain_head(policy):
        raise ModelError("this architecture transforms its logits: use --value_head separate")
    head = nn.Linear(hidden_size(policy), 1, device=policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def build_critic(policy: PreTrainedModel, critic_init: str) -> ValueModel:
    """A critic of its own: a copy of the policy's trunk, or the trunk and head of a reward model.

    A reward model that carries `reward_model.json` has its normalisation folded into the head, so that values
    start on the scale of the rewards that the server sends.

    Args:
        policy: gives the trunk, and the vocabulary that the critic must share, as it reads the policy's ids.
        critic_init: `policy`, or a folder of `AutoModelForSequenceClassification(num_labels=1)`.

    Raises:
        ModelError: the reward model cannot be loaded, or reads another vocabulary.
    """
    if critic_init == "policy":
        critic = ValueModel(copy.deepcopy(policy.base_model), hidden_size(policy)).to(policy.device)
        critic.head.float()
        return critic.eval()

    from transformers import AutoModelForSequenceClassification

    path = ModelRef.parse(critic_init).pretrained_path()
    require_pretrained(path)
    try:
        rm = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=policy.dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        raise ModelError(f"cannot load {critic_init!r} as a reward model: {reason(err)}") from err
    if rm.config.vocab_size != policy.config.vocab_size:
        raise ModelError(
            f"the reward model reads {rm.config.vocab_size} token ids and the policy writes "
            f"{policy.config.vocab_size}: a critic shares the policy's tokenizer; use --critic_init policy"
        )
    head = next(
        (m for m in (getattr(rm, "score", None), getattr(rm, "classifier", None)) if m is not None), None
    )
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{critic_init!r} has no linear scalar head; use --critic_init policy")
    critic = ValueModel(rm.base_model, head.in_features).to(policy.device)
    mean, std = _normalization(Path(path))
    with torch.no_grad():
        bias = head.bias if head.bias is not None else torch.zeros(1)
        critic.head.weight.copy_(head.weight / std)
        critic.head.bias.copy_((bias - mean) / std)
    return critic.eval()


def _normalization(folder: Path) -> tuple[float, float]:
    file = folder / "reward_model.json"
    if not file.is_file():
        return 0.0, 1.0
    info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return float(info["mean"]), float(info["std"])


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hex digits over all weights: two models with the same fingerprint compute the same function."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
