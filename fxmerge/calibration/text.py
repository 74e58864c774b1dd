"""Calibration data from text, prepared by the tokenizer of the network's directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import LoaderError
from fxmerge.networks import Network
from fxmerge.networks.transformers_models import quiet
from fxmerge.sources import package

SUFFIXES = (".txt", ".jsonl")

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

KEYS = ("text", "content", "prompt")
"""Where a line of JSON has its text, the first of these that is there."""


def read(
    texts: Iterable[str], where: str, network: Network, samples: int, batch: int, length: int
) -> list[dict[str, Tensor]]:
    """Rows of tokens, in batches of rows of one length, so that none is padded.

    Arguments:
        texts: lines that have text.
        where: they are from.
        network: whose tokenizer prepares them.
        samples: how many rows are taken at most.
        batch: how many rows a batch has at most.
        length: how many tokens a row has at most.

    A network that generates text gets blocks of `length` tokens of all lines joined, each as the tokenizer begins a
    text. Others get every line by itself, cut at `length` tokens.

    Raises:
        LoaderError: if the file has no text, or there is no tokenizer.
    """
    tokenizer = _tokenizer(network)
    config: Any = getattr(network.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise LoaderError(
            f"{network.arch} needs inputs of an encoder and of a decoder; pass --data package.module:loader."
        )
    longest = getattr(config, "max_position_embeddings", None) or length
    length = min(length, longest)
    generates = getattr(network.model, "can_generate", lambda: False)()
    rows = (_blocks if generates else _lines)(texts, tokenizer, length, samples)
    if not rows:
        raise LoaderError(f"{where} has no text: every line is empty.")
    known = getattr(config, "vocab_size", None)
    largest = max(max(row) for row in rows)
    if known is not None and largest >= known:
        raise LoaderError(
            f"The tokenizer of {network.directory} gives token {largest}, and the network knows {known}: it is the "
            "tokenizer of another network."
        )
    sizes = dict.fromkeys(len(row) for row in rows)
    batches = []
    for size in sizes:
        tokens = torch.tensor([row for row in rows if len(row) == size])
        batches += [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in tokens.split(batch)]
    return batches


def _tokenizer(network: Network) -> Any:
    if not any((network.directory / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one.
        raise LoaderError(
            f"{network.directory} has no tokenizer: none of {', '.join(VOCABULARIES)}. Copy its files "
            "beside the weights, or pass tokens as .npz with an array 'input_ids'."
        )
    try:
        with quiet():
            return package("transformers").AutoTokenizer.from_pretrained(network.directory, local_files_only=True)
    except Exception as error:
        raise LoaderError(
            f"The tokenizer of {network.directory} cannot be read ({type(error).__name__}). Copy its files again, "
            "or pass tokens as .npz with an array 'input_ids'."
        ) from error


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file that have text."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                found = _of_json(path, number, line) if path.suffix == ".jsonl" and line.strip() else line
                if found.strip():
                    yield found.strip("\n")
    except UnicodeDecodeError as error:
        raise LoaderError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise LoaderError(f"{path} cannot be read: {error.strerror}.") from error


def _of_json(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise LoaderError(f"Line {number} of {path} is no JSON: {error}.") from error
    if isinstance(found, str):
        return found
    held = found if isinstance(found, dict) else {}
    text = next((held[key] for key in KEYS if isinstance(held.get(key), str)), None)
    if not isinstance(text, str):
        raise LoaderError(f"Line {number} of {path} has no text under {', '.join(map(repr, KEYS))}.")
    return text


def _lines(texts: Iterable[str], tokenizer: Any, length: int, samples: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for line in texts:
        tokens = tokenizer(line, truncation=True, max_length=length)["input_ids"]
        rows += [tokens] if tokens else []
        if len(rows) == samples:
            break
    return rows


def _blocks(texts: Iterable[str], tokenizer: Any, length: int, samples: int) -> list[list[int]]:
    """Blocks of one length; the rest at the end is left out, unless it is all there is."""
    begin = [] if tokenizer.bos_token_id is None else tokenizer("")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    own, rows = length - len(begin), list[list[int]]()
    held: list[int] = []
    for line in texts:
        held += tokenizer(line, add_special_tokens=False)["input_ids"] + end
        while len(held) >= own and len(rows) < samples:
            rows.append(begin + held[:own])
            held = held[own:]
        if len(rows) == samples:
            break
    return rows or ([begin + held] if held else [])
