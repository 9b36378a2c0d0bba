"""Named shapes: parsing, checks, and the count of useful work."""

from itertools import product
from pathlib import Path

import pytest

from subquad import _native
from subquad.cli.bench import shape_file, shapes
from subquad.cli.bench.shapes import ExactShape, LatencyShape, MemoryShape, Shape
from subquad.cli.errors import UserError

MINIMAL = {"name": "a", "queries": 4, "head_dim": 8, "dtypes": ["float32"]}


def build(kind=ExactShape, **changes) -> Shape:
    return shape_file.build(kind, {**MINIMAL, **changes})


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "shapes.toml"
        path.write_text(text)
        return path

    return write


def flops_by_counting(shape: Shape) -> int:
    """Multiplies and adds of every visible pair, one by one."""
    operations = 0
    for query, key in product(range(shape.queries), range(shape.keys)):
        if not shape.causal or key <= query + shape.keys - shape.queries:
            operations += 2 * shape.head_dim  # q k
            operations += 2 * shape.head_dim_v  # p v
    return operations * shape.batch * shape.heads


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 2, 5, 9])
@pytest.mark.parametrize("keys", [1, 2, 4, 5, 6, 13])
def test_useful_flops(queries, keys, causal):
    shape = Shape("a", queries, 3, ("float32",), 2, 6, 3, keys, 5, causal)
    assert shape.useful_flops == flops_by_counting(shape)


def test_sizes_that_follow_from_others():
    shape = build(heads=6)
    assert (shape.batch, shape.heads, shape.kv_heads, shape.keys, shape.head_dim_v) == (1, 6, 6, 4, 8)
    assert (shape.causal, shape.threads, shape.dtypes) == (False, (), ("float32",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be text"),
        ({"name": 3}, "name must be text"),
        ({"queries": 0}, "queries must be a whole number of at least 1, got 0"),
        ({"queries": 2.0}, "queries must be a whole number"),
        ({"queries": True}, "queries must be a whole number"),
        ({"head_dim": "8"}, "head_dim must be a whole number"),
        ({"keys": -1}, "keys must be a whole number"),
        ({"heads": 6, "kv_heads": 4}, r"heads \(6\) must be a multiple of kv_heads \(4\)"),
        ({"causal": "yes"}, "causal must be true or false"),
        ({"dtypes": []}, "dtypes must not be empty"),
        ({"dtypes": ["float8"]}, "dtypes must be a list of some of float32, .* got .'float8'"),
        ({"dtypes": ["float32", "float32"]}, "none of them twice"),
        ({"dtypes": "float32"}, "dtypes must be a list"),
        ({"dtypes": [["float32"]]}, "dtypes must be a list"),
        ({"threads": 2}, "threads must be a list of whole numbers"),
        ({"threads": [0]}, "threads must be a list of whole numbers from 1 to 1024"),
        ({"threads": [1025]}, "threads must be a list of whole numbers from 1 to 1024"),
        ({"threads": [1, 1]}, "none of them twice"),
        ({"walls": 3}, "unknown key walls"),
        ({"limit_us": 3}, "unknown key limit_us"),
        ({"floor": 3}, "floor must give"),
        ({"floor": {"avx2": 70}}, "floor must give"),
        ({"floor": {"avx3": {"float32": 70}}}, "floor names avx3, which is no level"),
        ({"floor": {"avx2": {"float64": 70}}}, "floor names float64, which is .* not among dtypes"),
        ({"floor": {"avx2": {"float32": "70"}}}, "floor must be a number of at least 0"),
        ({"smoke": 1}, "smoke must be true or false"),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("kind", "name"), [(LatencyShape, "limit_us"), (MemoryShape, "limit_mib_per_thread")]
)
@pytest.mark.parametrize("value", [-1, "10", True, float("nan"), float("inf")])
def test_wrong_limits(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number of at least 0"):
        build(kind, **{name: value})


def test_missing_keys():
    with pytest.raises(ValueError, match="missing key head_dim, queries"):
        shape_file.build(Shape, {"name": "a", "dtypes": ["float32"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[exact]", "shapes.toml: Expected"),
        ("[[inexact]]\n", "unknown table inexact"),
        ("exact = 3", r"exact must be an array of tables, \[\[exact\]\]"),
        ('[exact]\nname = "a"', "exact must be an array of tables"),
        ("exact = [1]", "exact must be an array of tables"),
        ("[[exact]]\nqueries = 3", r"exact \(no name\): missing key dtypes, head_dim, name"),
        (
            '[[exact]]\nname = "a"\nqueries = 3\nhead_dim = 8\ndtypes = ["float32"]\n' * 2,
            "a: the name is used twice",
        ),
    ],
)
def test_wrong_files(write, text, message):
    with pytest.raises(UserError, match=message):
        shape_file.load("exact", ExactShape, write(text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        shape_file.load("exact", ExactShape, tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot read .*exact\.toml: No such file"):
        shape_file.load("exact", ExactShape, tmp_path)
    (tmp_path / "exact.toml").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*exact\.toml: Is a directory"):
        shape_file.load("exact", ExactShape, tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary: .*decode"):
        shape_file.load("exact", ExactShape, tmp_path / "binary")


def test_a_file_without_the_table(write):
    assert shape_file.load("memory", MemoryShape, write("")) == ()


def test_a_directory_has_a_file_for_each_table(tmp_path):
    for table in ("exact", "memory"):
        entry = f'[[{table}]]\nname = "{table}"\nqueries = 3\nhead_dim = 8\ndtypes = ["float32"]\n'
        (tmp_path / f"{table}.toml").write_text(entry)
    assert [shape.name for shape in shape_file.load("exact", ExactShape, tmp_path)] == ["exact"]
    assert [shape.name for shape in shape_file.load("memory", MemoryShape, tmp_path)] == ["memory"]


def test_selection():
    every = tuple(
        build(name=name, dtypes=["float32", "bfloat16"]) for name in ("dense-64", "causal-64", "causal-8")
    )

    def names(pattern: str) -> list[str]:
        return [f"{shape.name}/{dtype}" for shape, dtype in shape_file.select(every, pattern)]

    assert len(names("*")) == 6
    assert names("causal-8") == ["causal-8/float32", "causal-8/bfloat16"]
    assert names("causal-*/float32") == ["causal-64/float32", "causal-8/float32"]
    assert names("*/bfloat16") == ["dense-64/bfloat16", "causal-64/bfloat16", "causal-8/bfloat16"]
    assert names("CAUSAL-8") == names("causal") == []


@pytest.mark.parametrize(("table", "kind"), shape_file.TABLES.items())
def test_the_shapes_of_the_package(table, kind):
    every = shape_file.load(table, kind)
    assert every
    assert len({shape.name for shape in every}) == len(every)
    assert set(shape_file._parse(shape_file.DEFAULT_PATH / f"{table}.toml")) == {table}


def test_every_level_may_have_a_floor():
    assert set(_native.config()["levels"]) <= set(shapes.LEVELS)


def test_benches_reads_the_same_files():
    link = Path(__file__).parents[4] / "benches" / "shapes"
    if not link.exists():
        pytest.skip("not in a checkout")
    assert link.resolve() == shape_file.DEFAULT_PATH.resolve()
