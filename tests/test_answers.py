"""Networks compared by their outputs, where last layers do not tell."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.networks import mlp, muted, vectors


class Gained(nn.Module):
    """A parameter after the last layer, whose outputs are therefore in units of the network's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(seed)
        self.gain = nn.Parameter(torch.rand(10) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.net(x) * self.gain
        return scaled


def test_outputs_in_units_of_a_networks_own_are_not_compared() -> None:
    """The outputs of the networks are, as they are; and of models that answer different things, no one is returned."""
    a, b = Gained(0), muted(Gained(1))
    merged = fxmerge.merge(a, b, vectors())
    told = merged.meta["fxmerge"]
    assert told["parent"] is None
    assert told["compared"] == "outputs"
    x = torch.cat(vectors())
    with torch.no_grad():
        mean = (a(x) + b(x)) / 2
        outputs = {None: merged(x), 0: a(x), 1: b(x)}
    wanted = {j: float((own - mean).square().sum() / mean.square().sum()) for j, own in outputs.items()}
    assert told["errors"] == pytest.approx(wanted)


class Tied(nn.Module):
    """An output layer that is the embedding, as in many language models: it is not refitted."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(12, 6)
        self.hidden, self.back = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.embedding(tokens)
        scores: Tensor = (y + self.back(torch.relu(self.hidden(y)))) @ self.embedding.weight.T
        return scores


def tokens() -> list[Tensor]:
    return [torch.randint(12, (30, 5), generator=torch.Generator().manual_seed(k)) for k in range(4)]


@pytest.mark.parametrize("options", [{}, {"method": "align"}, {"method": "auto"}, {"max_memory": 1e-6}])
def test_of_tied_models_that_answer_alike_one_is_returned(
    options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """Two networks with the same scores of each token, in bases of their own: averages of these are no network."""
    first, second = Tied(0), Tied(1)
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
        second.load_state_dict(first.state_dict())
        second.embedding.weight.copy_(first.embedding.weight @ turn)
        second.hidden.weight.copy_(first.hidden.weight @ turn)
        second.back.weight.copy_(turn.T @ first.back.weight)
        second.back.bias.copy_(first.back.bias @ turn)
    x = torch.cat(tokens())
    torch.testing.assert_close(first(x), second(x), atol=1e-4, rtol=1e-4)
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(first, second, tokens(), **options)  # type: ignore[arg-type]
    told = merged.meta["fxmerge"]
    assert told["compared"] == "outputs"
    assert told["parent"] == 0  # Both are as near to the mean of both.
    assert told["errors"][0] < 1e-6 < 0.01 < told["errors"][None]
    assert "is returned as it is, since the models answer alike. Its outputs miss" in caplog.text
    torch.testing.assert_close(merged(x), first(x), atol=1e-4, rtol=1e-4)


def test_of_tied_models_the_merged_network_is_kept_if_it_answers_as_they_do() -> None:
    told = fxmerge.merge(Tied(0), Tied(0), tokens()).meta["fxmerge"]
    assert told["parent"] is None
    assert max(told["errors"].values()) < 1e-6


class Recurrent(nn.Module):
    """No layer is the last one, since each reads what the other gave before; outputs are nested, of several kinds. That
    which does not depend on parameters does not count."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.cells = nn.Embedding(12, 6), nn.LSTM(6, 8, batch_first=True)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        y = self.cells(self.embedding(tokens))[0]
        return {"sum": y.sum(-1), "rest": [tokens.float(), self.gain, y.argmax(-1), (y[:, -1],)]}


def test_outputs_of_networks_without_a_last_layer_are_compared() -> None:
    a, b = Recurrent(0), Recurrent(1)
    merged = fxmerge.merge(a, b, tokens())
    told = merged.meta["fxmerge"]
    assert told["parent"] is None
    assert told["compared"] == "outputs"
    x = torch.cat(tokens())
    with torch.no_grad():
        outputs = {j: (found["sum"], found["rest"][3][0]) for j, found in {None: merged(x), 0: a(x), 1: b(x)}.items()}
    means = [(p + q) / 2 for p, q in zip(outputs[0], outputs[1], strict=True)]
    wanted = {
        j: sum(float((y - m).square().sum() / m.square().sum()) for y, m in zip(own, means, strict=True)) / 2
        for j, own in outputs.items()
    }
    assert told["errors"] == pytest.approx(wanted, rel=1e-3)


class Masked(Tied):
    """A score that is ruled out."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).masked_fill(torch.arange(12) == 3, -torch.inf)


def test_what_is_ruled_out_in_all_networks_does_not_count() -> None:
    plain, masked = (
        fxmerge.merge(kind(0), kind(1), tokens(), method="align", alpha=1.0).meta["fxmerge"] for kind in (Tied, Masked)
    )
    assert masked["compared"] == "outputs"
    assert all(0 < error < 10 for error in masked["errors"].values())
    assert masked["errors"] != plain["errors"]


def test_outputs_of_half_precision_are_compared_in_single() -> None:
    """Squares of these are beyond the largest number of half precision."""

    class Large(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return (100 * super().forward(tokens)).half()

    half = fxmerge.merge(Large(0), Large(1), tokens()).meta["fxmerge"]
    single = fxmerge.merge(Tied(0), Tied(1), tokens()).meta["fxmerge"]
    assert half["errors"] == pytest.approx(single["errors"], rel=1e-2)


class TwoHeads(Tied):
    """A second head can be refitted. It does not tell what the first one knows."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.value = nn.Linear(10, 1)

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens), self.value(torch.relu(self.hidden(self.embedding(tokens))))


def test_a_head_that_can_be_refitted_does_not_answer_for_one_that_cannot() -> None:
    told = fxmerge.merge(TwoHeads(0), TwoHeads(1), tokens()).meta["fxmerge"]
    assert told["compared"] == "outputs"
    assert "embedding.weight" in told["left"]


def test_a_score_can_take_a_tied_model_as_it_is() -> None:
    models = [Tied(k) for k in (1, 2, 3)]
    x = torch.cat(tokens())
    wanted = models[1](x).detach()
    merged = fxmerge.merge_many(models, tokens(), score=lambda network: -(network(x) - wanted).square().mean())
    told = merged.meta["fxmerge"]
    assert told["parent"] == 1
    assert list(told["errors"]) == [None, 0, 1, 2]
    assert [(one["parent"], one["refitted"]) for one in told["scores"]] == [
        (None, True),
        *((j, False) for j in range(3)),
    ]
    torch.testing.assert_close(merged(x), wanted, atol=1e-4, rtol=1e-4)


def test_models_that_answer_nothing_are_not_compared() -> None:
    silent = Tied(0)
    nn.init.zeros_(silent.embedding.weight)
    told = fxmerge.merge(silent, silent, tokens()).meta["fxmerge"]
    assert told["compared"] is None
    assert told["errors"] == {}
