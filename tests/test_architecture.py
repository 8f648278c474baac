"""The floors of CONTRIBUTING.md: a module imports from its own and those below, and never in a circle."""

import grimp
import networkx
import pytest

FLOORS = [
    {
        "locat_lightning.errors",
        "locat_lightning.labels",
        "locat_lightning.records",
        "locat",
        "locat.configs",
        "locat.errors",
        "locat.jobs",
        "locat.runs",
    },
    {"locat_lightning.nn", "locat_lightning.data", "locat_lightning.schedules"},
    {"locat_lightning.backbones"},
    {"locat_lightning"},  # the package itself, whose import registers the backbones
    {
        "locat_lightning.evaluation",
        "locat_lightning.inspection",
        "locat_lightning.structure",
        "locat_lightning.figures",
    },
    {"locat_lightning.tasks", "locat_lightning.methods"},
    {"locat_lightning.callbacks"},
    {"locat_lightning.commands"},
    {"locat.command", "locat.__main__"},
]


@pytest.fixture(scope="module")
def imports():
    """Edges (importer, imported) between modules, imports inside functions among them."""
    graph = grimp.build_graph("locat", "locat_lightning", cache_dir=None)
    return [
        (each, other) for each in graph.modules for other in graph.find_modules_directly_imported_by(each)
    ]


def floor_of(module):
    """The number of the floor of a module or of the package that it is in."""
    while module:
        for number, floor in enumerate(FLOORS):
            if module in floor:
                return number
        module = module.rpartition(".")[0]
    raise AssertionError("every module is on a floor")


def test_every_module_is_in_a_room(imports):
    rooms = {".".join(module.split(".")[:2]) for edge in imports for module in edge}
    assert sorted(rooms - set().union(*FLOORS)) == []


def test_no_import_leads_upwards(imports):
    assert [f"{a} -> {b}" for a, b in imports if floor_of(a) < floor_of(b)] == []


def test_no_modules_import_each_other_in_a_circle(imports):
    assert [
        sorted(each)
        for each in networkx.strongly_connected_components(networkx.DiGraph(imports))
        if len(each) > 1
    ] == []


def test_the_graph_sees_what_is_there(imports):
    assert ("locat_lightning.commands.fit", "locat_lightning.tasks.base") in imports
    assert len(imports) > 200
