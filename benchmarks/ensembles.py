"""Published ensembles that nobody here trained: what a merge of their members gives, beside the members themselves.

ADMET-AI (PyPI package admet-ai 2.0.1) has two ensembles of five message-passing networks (chemprop) that predict
properties of molecules: 10 real values, and 31 probabilities. Its list of approved drugs gives the molecules, as
SMILES. Half of them are calibration data, and everything is measured on the other half. No labels are used.

    pip install -e '.[ensembles]'
    python benchmarks/ensembles.py [--short] [--package FOLDER] [--markdown FILE]

The package is downloaded by pip without what it depends on, unless `--package` names a folder that it was unpacked to.
Weights are read without running code from the files: classes that they name are replaced by empty ones.
"""

from __future__ import annotations

import argparse
import csv
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from invariance import machine, table
from models.processes import Row
from torch import Tensor, nn

import fxmerge
from fxmerge import Recipe, Run

PACKAGE = "admet-ai==2.0.1"
ENSEMBLES = {"regression": 10, "classification": 31}
"""The ensembles, and how many outputs their networks have."""
MEMBERS = 5
ATOM, BOND, HIDDEN, DEPTH = 72, 14, 300, 3
MOLECULES = 64
"""The molecules in a batch."""
BATCHES = 32
MOST_ATOMS, MOST_BONDS = 40, 84
"""Larger molecules are left out; a bond counts twice, once for each direction."""

Batch = dict[str, Tensor]


# ---------------------------------------------------------------------- networks


class MessagePassing(nn.Module):
    """Messages along the directed bonds of molecules (chemprop's BondMessagePassing, arXiv 1904.01561)."""

    def __init__(self) -> None:
        super().__init__()
        self.W_i = nn.Linear(ATOM + BOND, HIDDEN, bias=False)
        self.W_h = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.W_o = nn.Linear(ATOM + HIDDEN, HIDDEN)

    def forward(self, atoms: Tensor, bonds: Tensor, source: Tensor, target: Tensor, back: Tensor) -> Tensor:
        first = self.W_i(torch.cat([atoms[source], bonds], dim=1))
        hidden = first.relu()
        none = hidden.new_zeros(atoms.shape[0], HIDDEN)
        for _ in range(1, DEPTH):
            arrived = none.index_add(0, target, hidden)
            hidden = (first + self.W_h(arrived[source] - hidden[back])).relu()
        return self.W_o(torch.cat([atoms, none.index_add(0, target, hidden)], dim=1)).relu()


class Predictor(nn.Module):
    """Two layers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        last = nn.Sequential(nn.ReLU(), nn.Dropout(0.0), nn.Linear(HIDDEN, outputs))
        self.ffn = nn.Sequential(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)), last)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x)
        return y


class Network(nn.Module):
    """A network of an ensemble: molecules in, one row of outputs for each."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.message_passing = MessagePassing()
        self.predictor = Predictor(outputs)

    def forward(
        self, atoms: Tensor, bonds: Tensor, source: Tensor, target: Tensor, back: Tensor, molecule: Tensor
    ) -> Tensor:
        hidden = self.message_passing(atoms, bonds, source, target, back)
        # The last row is of the atoms that fill a batch.
        pooled = hidden.new_zeros(MOLECULES + 1, HIDDEN).index_add(0, molecule, hidden) / 100
        out: Tensor = self.predictor(pooled[:MOLECULES])
        return out


class _Empty(dict[Any, Any]):
    """Stands for every class that a file of weights names, and runs nothing of it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Reads tensors, dicts and numbers, and puts an empty class in place of everything else."""

    SAFE: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch", "FloatStorage"): torch.FloatStorage,
        ("torch", "LongStorage"): torch.LongStorage,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self.SAFE.get((module, name), _Empty)


def weights_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, read without running code from it."""
    unpickling = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="safe")
    found = torch.load(path, pickle_module=unpickling, weights_only=False, map_location="cpu")
    state: dict[str, Tensor] = found["state_dict"]
    return state


def load(paths: Sequence[Path], outputs: int) -> list[nn.Module]:
    """The networks of an ensemble. Real values are given in the standard units of the first network, so that each
    counts alike; probabilities are given before the sigmoid."""
    networks = list[nn.Module]()
    shift, scale = (torch.zeros(outputs), torch.ones(outputs))
    for path in paths:
        network, state = Network(outputs), weights_of(path)
        network.load_state_dict({name: state[name] for name in network.state_dict()})
        if "predictor.output_transform.mean" in state:
            own = [state[f"predictor.output_transform.{name}"].reshape(-1) for name in ("mean", "scale")]
            shift, scale = (shift, scale) if networks else own
            last = network.predictor.ffn[1][2]
            with torch.no_grad():
                last.weight *= (own[1] / scale)[:, None]
                last.bias.copy_((last.bias * own[1] + own[0] - shift) / scale)
        networks.append(network.eval())
    return networks


# ---------------------------------------------------------------------- molecules


def one_hot(value: object, choices: Sequence[object]) -> list[float]:
    """A one where the value is; behind the choices if it is none of them."""
    at = choices.index(value) if value in choices else len(choices)
    return [float(i == at) for i in range(len(choices) + 1)]


def graph_of(smiles: str) -> tuple[list[list[float]], list[list[float]], list[tuple[int, int]]] | None:
    """The features of a molecule's atoms and directed bonds (chemprop's second version), and the atoms of each bond;
    None if it is too large, or no molecule."""
    from rdkit import Chem
    from rdkit.Chem.rdchem import BondType, HybridizationType

    molecule = Chem.MolFromSmiles(smiles)
    if (
        molecule is None
        or not 0 < molecule.GetNumAtoms() <= MOST_ATOMS
        or not 0 < 2 * molecule.GetNumBonds() <= MOST_BONDS
    ):
        return None
    hybridizations = [getattr(HybridizationType, n) for n in ("S", "SP", "SP2", "SP2D", "SP3", "SP3D", "SP3D2")]
    kinds = [BondType.SINGLE, BondType.DOUBLE, BondType.TRIPLE, BondType.AROMATIC]
    atoms = [
        one_hot(atom.GetAtomicNum(), [*range(1, 37), 53])
        + one_hot(atom.GetTotalDegree(), [*range(6)])
        + one_hot(atom.GetFormalCharge(), [-1, -2, 1, 2, 0])
        + one_hot(int(atom.GetChiralTag()), [*range(4)])
        + one_hot(int(atom.GetTotalNumHs()), [*range(5)])
        + one_hot(atom.GetHybridization(), hybridizations)
        + [float(atom.GetIsAromatic()), 0.01 * atom.GetMass()]
        for atom in molecule.GetAtoms()
    ]
    bonds, ends = list[list[float]](), list[tuple[int, int]]()
    for bond in molecule.GetBonds():
        kind = [0.0, *one_hot(bond.GetBondType(), kinds)[:-1], float(bond.GetIsConjugated()), float(bond.IsInRing())]
        bonds += [kind + one_hot(int(bond.GetStereo()), [*range(6)])] * 2
        u, v = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        ends += [(u, v), (v, u)]
    return atoms, bonds, ends


def batch_of(graphs: Sequence[Any]) -> Batch:
    """Molecules as one graph, filled up with atoms and bonds of no molecule so that all batches have one size."""
    atoms = torch.zeros(MOLECULES * MOST_ATOMS + 1, ATOM)
    bonds = torch.zeros(MOLECULES * MOST_BONDS, BOND)
    last, size = len(atoms) - 1, len(bonds)
    source, target = torch.full((2, size), last)
    molecule = torch.full((len(atoms),), MOLECULES)
    a = b = 0
    for number, (own, edges, ends) in enumerate(graphs):
        atoms[a : a + len(own)] = torch.tensor(own)
        bonds[b : b + len(edges)] = torch.tensor(edges)
        source[b : b + len(ends)], target[b : b + len(ends)] = torch.tensor(ends).T + a
        molecule[a : a + len(own)] = number
        a, b = a + len(own), b + len(edges)
    back = torch.arange(size).view(-1, 2).flip(1).reshape(-1)
    return {"atoms": atoms, "bonds": bonds, "source": source, "target": target, "back": back, "molecule": molecule}


def batches_of(path: Path, count: int) -> list[Batch]:
    """Batches of the molecules in a table, in an order that is random and always the same."""
    with path.open(newline="") as file:
        smiles = [row["smiles"] for row in csv.DictReader(file)]
    order = torch.randperm(len(smiles), generator=torch.Generator().manual_seed(0)).tolist()
    found, graphs = list[Batch](), list[Any]()
    for i in order:
        graph = graph_of(smiles[i])
        if graph is not None:
            graphs.append(graph)
        if len(graphs) == MOLECULES:
            found.append(batch_of(graphs))
            graphs = []
        if len(found) == count:
            break
    return found


# ---------------------------------------------------------------------- the tables


def compare(networks: Sequence[nn.Module], fitted: list[Batch], new: list[Batch]) -> list[Row]:
    """Distances to the ensemble of all members, as shares of its variance, and to members that took no part."""
    how = Run(progress=False)
    merge = fxmerge.merge_many(networks, fitted, run=how)
    averaged = fxmerge.merge_many(networks, fitted, Recipe(fit=None), run=how)
    made = {"merge of all": merge, "units matched and averaged": averaged}
    found = fxmerge.compare(made, networks, new, calibration=fitted, run=how)
    rows: list[Row] = [
        {"network": row.name, "distance to the ensemble": f"{row.distance:.3f} ± {row.error:.3f}"} for row in found.rows
    ]
    return rows


def pairs(networks: Sequence[nn.Module], fitted: list[Batch], new: list[Batch], count: int) -> list[Row]:
    """The same for pairs of members, and the distance to the mean of the members that took no part."""
    how, rows = Run(progress=False), list[Row]()
    for i, j in list(combinations(range(len(networks)), 2))[:count]:
        pair = [networks[i], networks[j]]
        others = [n for k, n in enumerate(networks) if k not in (i, j)]
        merged = fxmerge.merge(*pair, fitted, run=how)
        near = fxmerge.compare({"merge": merged}, pair, new, calibration=fitted, run=how)
        shown = {name: near.networks[name] for name in near.networks if name in KINDS}
        away = fxmerge.compare({KINDS[n]: own for n, own in shown.items()}, others, new, run=how)
        for name, kind in KINDS.items():
            rows.append(
                {
                    "members": f"{i + 1} and {j + 1}",
                    "network": kind,
                    "distance to their ensemble": f"{near[name].distance:.3f} ± {near[name].error:.3f}",
                    "distance to the other members": f"{away[kind].distance:.3f} ± {away[kind].error:.3f}",
                }
            )
    return rows


KINDS = {
    "model A": "the first",
    "model B": "the second",
    "model A, new readout": "the first, new readout",
    "model B, new readout": "the second, new readout",
    "plain average": "average, nothing matched",
    "merge": "merge of both",
}


@contextmanager
def unpacked(package: Path | None) -> Iterator[Path]:
    """The folder of the package."""
    if package is not None:
        yield package
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(scratch)
        yield Path(scratch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one ensemble, one pair, and few molecules")
    parser.add_argument("--package", type=Path, help="folder that the package was unpacked to")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = [machine()]
    with unpacked(options.package) as package:
        resources = package / "admet_ai" / "resources"
        batches = batches_of(resources / "data" / "drugbank_approved.csv", 4 if options.short else BATCHES)
        fitted, new = batches[::2], batches[1::2]
        text.append(
            f"{PACKAGE}; {len(fitted) * MOLECULES} molecules to merge on, {len(new) * MOLECULES} others to compare on"
        )
        for name, outputs in list(ENSEMBLES.items())[: 1 if options.short else None]:
            text.append(f"{name.capitalize()}, {outputs} outputs")
            paths = [resources / "models" / f"admet_{name}" / f"model_{m}.pt" for m in range(MEMBERS)]
            networks = load(paths[: 3 if options.short else None], outputs)
            text.append(table(compare(networks, fitted, new)))
            text.append(table(pairs(networks, fitted, new, 1 if options.short else 3)))
            print("\n\n".join(text), flush=True)
    if options.markdown:
        options.markdown.write_text("\n\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
