"""The import graph of the package has no circle, neither between modules nor between folders."""

import ast
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
