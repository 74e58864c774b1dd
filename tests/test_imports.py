"""The import graph of the package has no circle, neither between modules nor between folders."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import networkx as nx

import fxmerge

ROOT = Path(fxmerge.__file__).parent


def imports() -> "nx.DiGraph[str]":
    """Every module of the package, with an edge to each module that it imports, wherever in the file it does so."""
    files = {".".join(("fxmerge", *p.relative_to(ROOT).with_suffix("").parts)): p for p in ROOT.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [one if one in files else node.module for one in inside]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            graph.add_edges_from((name, one) for one in found if one in files and one != name)
    return graph


def folder(module: str) -> str:
    """The folder of a module; a module of no folder counts as one."""
    parts = module.split(".")
    return ".".join(parts[:2])


def circles(graph: "nx.DiGraph[str]") -> list[set[str]]:
    return [found for found in nx.strongly_connected_components(graph) if len(found) > 1]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = imports()
    assert graph.number_of_edges() > 300
    assert circles(graph) == []


def test_no_folder_imports_itself_by_way_of_others() -> None:
    folders = nx.DiGraph((folder(a), folder(b)) for a, b in imports().edges if folder(a) != folder(b))
    assert circles(folders) == []


def test_relative_imports_are_not_used() -> None:
    """They would escape the graph above."""
    for path in ROOT.rglob("*.py"):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert all(not n.level for n in nodes), path


def test_the_public_names_are_imported_when_they_are_used() -> None:
    code = """
import sys, fxmerge, fxmerge.errors, fxmerge.io, fxmerge.cli.app
assert "torch" not in sys.modules
from fxmerge import *
assert merge is fxmerge.merge is fxmerge.api.merge and fxmerge.Recipe is Recipe
assert {"merge", "fold", "Symmetry", "__version__"} <= set(dir(fxmerge))
assert not hasattr(fxmerge, "mrege") and not hasattr(fxmerge, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_documented_where_it_is_defined() -> None:
    public = importlib.import_module("fxmerge.public")
    names = [name for name in vars(public) if not name.startswith("_")]
    assert len(names) > 40 and all(getattr(fxmerge, name).__doc__ for name in names)
