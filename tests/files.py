"""Small networks as files, for tests of what reads files."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxmerge import io

WORDS = re.findall(r"\w+", "the cat dog sat ran on under mat rug a big small red blue house tree and saw it then")


def mlp(hidden: int = 8, num_classes: int = 3) -> tuple[nn.Module, torch.Tensor]:
    """A factory as users write them, for `--arch tests.files:mlp`."""
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)), torch.zeros(1, 4)


def deep(hidden: int = 96) -> tuple[nn.Module, torch.Tensor]:
    """A network with layers enough that a merge takes some time."""
    inner = [layer for _ in range(6) for layer in (nn.Linear(hidden, hidden), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), *inner, nn.Linear(hidden, 3)), torch.zeros(1, 4)


def tied() -> tuple[nn.Module, torch.Tensor]:
    """A network with one tensor under two names."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.ReLU(), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    return model, torch.zeros(1, 2, dtype=torch.long)


def unsettled() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.zeros(2, 4)


def batches() -> list[torch.Tensor]:
    """A loader, for `--data tests.files:batches`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 4, generator=generator) for _ in range(4)]


def strange() -> list[object]:
    return [object()]


def empty() -> list[torch.Tensor]:
    return []


def weights(path: Path, seed: int = 0, **sizes: Any) -> Path:
    """The weights of `mlp`, as a file."""
    torch.manual_seed(seed)
    io.save(mlp(**sizes)[0].state_dict(), path)
    return path


def gpt2(folder: Path, seed: int = 0, tokenizer: bool = True) -> Path:
    """A tiny GPT-2 with a tokenizer of twenty words, as a directory of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    end = len(WORDS) + 1
    config = GPT2Config(
        vocab_size=end + 1,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return words(folder) if tokenizer else folder


def words(folder: Path) -> Path:
    """A tokenizer of twenty words, in a directory of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, "<unk>", "<end>"])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return folder


def qwen3_moe(folder: Path, seed: int = 0) -> Path:
    """A tiny mixture of eight experts with the same tokenizer, as a directory of transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), len(WORDS) + 1)
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS) + 2, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, **sizes, **heads, **ends
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return words(folder)


def bert(folder: Path, seed: int = 0) -> Path:
    """A tiny BERT whose tokenizer puts a token before and after every line."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", "[CLS]", "[SEP]"])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    own.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(folder)
    return folder


def vit(folder: Path, seed: int = 0) -> Path:
    """A tiny vision transformer with its image processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def corpus(path: Path, lines: int = 80) -> Path:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (lines, 9), generator=generator).tolist()
    path.write_text("\n".join(" ".join(WORDS[i] for i in own) for own in picks) + "\n")
    return path


class Branching(nn.Module):
    """A network whose path depends on its inputs, which torch.export does not write."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(x)) if x.sum() > -1 else torch.tanh(self.up(x))
        out: torch.Tensor = self.down(hidden)
        return out


def branching() -> tuple[nn.Module, torch.Tensor]:
    return Branching(), torch.zeros(2, 4)


class Ordered(nn.Sequential):
    """A network in which the order of hidden units counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self[0](x)).cumsum(-1)
        out: torch.Tensor = self[2](hidden)
        return out


def ordered() -> tuple[nn.Module, torch.Tensor]:
    return Ordered(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4)
