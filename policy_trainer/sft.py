"""`rlaif train sft`: supervised fine-tuning. The loss is on the response alone, averaged over the step's tokens."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from policy_trainer import optim
from policy_trainer.batching import collate, data_id, forward_batches
from policy_trainer.card import write_card
from policy_trainer.checkpoint import (
    check_same_data,
    load_latest,
    restore_rng,
    save_checkpoint,
    save_final,
)
from policy_trainer.config import SFTConfig
from policy_trainer.logprobs import token_logprobs
from policy_trainer.models import declared_eos, load_trained
from policy_trainer.parallel import ALONE, World, joined, run_directory
from rlaif import shapes
from rlaif.chat import EncodedPair, encode_pair
from rlaif.errors import ConfigError, DataError
from rlaif.fields import Row
from rlaif.records import Quarantine, read_as, read_rows
from rlaif.runs import progress
from rlaif.signals import stop_on_signal
from rlaif.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(config: SFTConfig) -> None:
    """Fine-tune, or go on from the run directory's last checkpoint.

    Raises:
        QualityError: a gradient or the loss is not finite.
        KeyboardInterrupt: SIGTERM or SIGINT asked for an end; a checkpoint has been written.
        RlaifError: bad input, see the message.
    """
    with (
        joined() as world,
        run_directory(world, config, command="train sft") as out,
        stop_on_signal() as stop,
    ):
        checkpoint = load_latest(config.output_dir, world)
        trained = load_trained(config, None if checkpoint is None else checkpoint.path)
        model, tokenizer = trained.model, trained.tokenizer
        examples = load_examples(config, tokenizer, world, eos_ids=declared_eos(model, tokenizer))
        data = data_id(ids for example in examples for ids in example)
        if checkpoint is not None:
            check_same_data(checkpoint, data, config.dataset)
        check_context(
            config, examples, getattr(model.config.get_text_config(), "max_position_embeddings", None)
        )
        optimizer = optim.adamw(model.parameters(), config.learning_rate, config)
        step = 0
        if checkpoint is None:
            torch.manual_seed(config.seed)
        else:
            step = checkpoint.step
            optimizer.load_state_dict(checkpoint.state["optimizer"])
            restore_rng(checkpoint.state["rng"])
        if out is not None:
            out.truncate_metrics(step)

        total = config.num_train_epochs * len(examples)
        steps = math.ceil(total / config.per_device_train_batch_size)
        if config.max_steps is not None:
            steps = min(steps, config.max_steps)
        parameters = list(model.parameters())
        if 0 < step < steps and world.is_main:
            print(f"going on from step {step}", file=sys.stderr)
        with progress(steps, "SFT steps", done=step) if world.is_main else nullcontext() as bar:
            while step < steps:
                started = time.perf_counter()
                seen = step * config.per_device_train_batch_size
                count = min(config.per_device_train_batch_size, total - seen)
                chosen = [examples[i] for i in optim.shuffled_stream(len(examples), config.seed, seen, count)]
                rate = config.learning_rate * optim.lr_factor(
                    config.lr_scheduler_type, step, steps, config.warmup_steps
                )
                optim.set_learning_rate(optimizer, rate)
                optimizer.zero_grad(set_to_none=True)
                loss = accumulate_gradients(
                    model, chosen, micro_batch_tokens=config.micro_batch_tokens, world=world
                )
                world.add_gradients(parameters)
                norm = optim.clip_gradients(parameters, config.max_grad_norm, "model")
                optimizer.step()

                step += 1
                stopping = world.any(bool(stop))
                if out is not None:
                    out.log(
                        step,
                        {
                            "loss": loss,
                            "epoch": (seen + count) / len(examples),
                            "num_tokens": sum(len(e.response_ids) for e in chosen),
                            "grad_norm": norm.item(),
                            "learning_rate": rate,
                            "time/step": time.perf_counter() - started,
                        },
                    )
                if bar is not None:
                    bar.advance(1, loss=loss)
                if world.is_main and (stopping or step % config.save_steps == 0 or step == steps):
                    save_checkpoint(
                        config.output_dir,
                        step,
                        policy=trained.saved,
                        tokenizer=tokenizer,
                        state={"optimizer": optimizer.state_dict()},
                        info={"examples": len(examples), "data": data},
                        keep=config.save_total_limit,
                    )
                if stopping and step < steps:
                    raise KeyboardInterrupt
        if out is not None:
            save_final(config.output_dir, trained.merged(), tokenizer)
            out.end(step, "max_steps")
            write_card(out)


def accumulate_gradients(
    model: PreTrainedModel,
    examples: Sequence[EncodedPair],
    *,
    micro_batch_tokens: int,
    temperature: float = 1.0,
    weight: float = 1.0,
    world: World = ALONE,
) -> float:
    """Add the gradient of `weight` times the negative log-likelihood per response token.

    Each micro-batch adds its *sum* divided by the tokens of the whole step, so that neither the cut into micro-batches
    nor padding nor order matters.

    Args:
        model: in eval mode (no dropout), with gradients.
        examples: one optimiser step's.
        micro_batch_tokens: padded tokens in one forward pass.
        temperature: of the distribution that is fitted.
        weight: of the loss.
        world: the processes that share the work; each adds the gradient of its share.

    Returns:
        The loss of all without its weight, in nats per token.
    """
    tokens = sum(len(e.response_ids) for e in examples)
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in examples]
    total = 0.0
    buckets = forward_batches(lengths, max_tokens=micro_batch_tokens, device=model.device)
    for rows in world.share(buckets):
        micro = [examples[i] for i in rows]
        batch = collate([e.prompt_ids for e in micro], [e.response_ids for e in micro]).to(model.device)
        read = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.response_len, temperature=temperature
        )
        loss = -read.logprobs[batch.response_mask].sum() / tokens
        torch.autograd.backward(weight * loss)
        total += loss.item()
    return sum(world.gather(total))


def load_examples(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    world: World = ALONE,
    *,
    eos_ids: Collection[int] = (),
) -> list[EncodedPair]:
    """Prompts and responses as token ids; what is unusable or too long goes to `quarantine.jsonl`.

    `eos_ids` are tokens that end a response beside the tokenizer's EOS.

    Raises:
        DataError: nothing usable is left.
    """
    quarantine = Quarantine(config.output_dir / "quarantine.jsonl" if world.is_main else None)
    return read_examples(config.dataset, tokenizer, config.max_length, quarantine, eos_ids=eos_ids)


def read_examples(
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    quarantine: Quarantine,
    *,
    eos_ids: Collection[int] = (),
) -> list[EncodedPair]:
    """Prompts and responses as token ids: of conversations, or of the chosen side of preferences.

    What is unusable, refused by the chat template or longer than `max_length` tokens is in quarantine.

    `eos_ids` are tokens that end a response beside the tokenizer's EOS.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """

    def encode(prompt: Conversation, response: str) -> EncodedPair:
        example = encode_pair(tokenizer, prompt, response, eos_ids=eos_ids)
        if len(example.prompt_ids) + len(example.response_ids) > max_length:
            raise DataError(f"longer than max_length {max_length} tokens")
        return example

    def of_conversation(row: Row) -> list[EncodedPair]:
        *prompt, response = shapes.parse_conversation(row)
        return [encode(tuple(prompt), response.content)]

    def of_preferences(row: Row) -> list[EncodedPair]:
        return [encode(pair.prompt, pair.chosen) for pair in shapes.parse_preferences(row)]

    _, first = next(read_rows(dataset, Quarantine(None)))
    if "chosen" in first:
        read = read_as(dataset, quarantine, of_preferences, shapes.PAIR_SHAPES)
    else:
        read = read_as(dataset, quarantine, of_conversation, shapes.CONVERSATION_SHAPES)
    return list(chain.from_iterable(read))


def check_context(config: SFTConfig, examples: list[EncodedPair], context: int | None) -> None:
    """All examples fit the model's context.

    Raises:
        ConfigError: they do not.
    """
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in examples)
    if context is not None and longest > context:
        raise ConfigError(
            f"a conversation of {longest} tokens exceeds the model's context of {context}: lower --max_length"
        )
