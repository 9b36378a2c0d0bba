"""Forward-mode derivatives and double backward against PyTorch's differentiation of the dense formula."""

import numpy as np
import pytest
import torch

import subquad
from subquad import _native
from subquad.masks import padding
from subquad.normalizers import Sigmoid

# PyTorch compiles decompositions when it first differentiates forwards.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script`:FutureWarning")

NAMES = ("do", "q", "k", "v", "dlse")


class Case:
    """Inputs and directions of a call."""

    def __init__(self, q_len, k_len, *, heads=(2, 2), dims=(8, 8), seed=0, **options):
        generator = np.random.default_rng(seed)
        (h, h_kv), (d, d_v) = heads, dims
        draw = generator.standard_normal
        shapes = {
            "q": (2, q_len, h, d),
            "k": (2, k_len, h_kv, d),
            "v": (2, k_len, h_kv, d_v),
            "do": (2, q_len, h, d_v),
            "dlse": (2, h, q_len),
        }
        self.arrays = {name: draw(shape) for name, shape in shapes.items()}
        self.directions = {name: draw(shapes[name]) for name in "qkv"}
        for name in ("bias", "relative_bias"):
            if name in options:
                options[name] = shape = options[name]
                if not isinstance(shape, np.ndarray):
                    options[name] = draw(shape)
                if options[name].dtype != bool:
                    self.arrays[name] = options.pop(name)
                    self.directions[name] = draw(self.arrays[name].shape)
        self.options = options
        self.q_len, self.k_len, self.group = q_len, k_len, h // max(h_kv, 1)

    def visible(self):
        """Returns what the mask shows, `[Sq, Sk]`, or broadcast to `[B, H, Sq, Sk]`."""
        distance = np.arange(self.k_len)[None] - np.arange(self.q_len)[:, None] - (self.k_len - self.q_len)
        left, right = self.options.get("window_size") or (None, None)
        seen = np.ones_like(distance, bool)
        if self.options.get("causal"):
            seen &= distance <= 0
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        if "bias" in self.options:
            seen = seen & self.options["bias"]
        if "mask" in self.options:
            lengths = np.asarray(self.options["mask"].lengths).reshape(-1, 1, 1, 1)
            seen = seen & (np.arange(self.k_len) < lengths)
        return torch.from_numpy(seen)

    def dense(self, q, k, v, bias=None, relative_bias=None):
        """Returns output and log-sum-exp by the definition."""
        k, v = (x.repeat_interleave(self.group, 2) for x in (k, v))
        scale = self.options.get("scale", q.shape[-1] ** -0.5)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * torch.as_tensor(scale, dtype=torch.float64).reshape(
            (1, -1, 1, 1) if np.ndim(scale) else ()
        )
        if bias is not None:
            scores = scores + bias
        distance = torch.arange(self.k_len)[None] - torch.arange(self.q_len)[:, None]
        if relative_bias is not None:
            scores = scores + relative_bias[:, distance + self.q_len - 1]
        if "alibi_slopes" in self.options:
            slopes = torch.from_numpy(self.options["alibi_slopes"]).reshape(-1, 1, 1)
            scores = scores - slopes * (distance - (self.k_len - self.q_len)).abs()
        hidden = ~self.visible().expand(scores.shape)
        # Finite, so that nothing that is hidden becomes NaN; rows without a key are told apart.
        scores = scores.masked_fill(hidden, -1e30)
        empty = hidden.all(-1)
        sinks = self.options.get("sinks")
        if sinks is not None:
            sinks = torch.from_numpy(sinks).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            lse = torch.logsumexp(torch.cat([scores, sinks], -1), -1)
        else:
            lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse[..., None]).masked_fill(hidden | empty[..., None], 0.0)
        return torch.einsum("bhij,bjhd->bihd", weights, v), torch.where(empty, torch.zeros(()), lse)

    def inputs(self):
        """Returns the names of what is differentiated."""
        return [name for name in ("q", "k", "v", "bias", "relative_bias") if name in self.arrays]

    def call_options(self, dtype=np.float64):
        """Returns the options of a call."""
        biases = {name: self.arrays[name] for name in self.inputs() if name not in "qkv"}
        own = {name: _cast(name, x, dtype) for name, x in self.options.items()}
        return own | {name: x.astype(dtype) for name, x in biases.items()}

    def jvp(self, dtype=np.float64, names=None):
        """Returns the derivatives of the native function."""
        q, k, v = (self.arrays[name].astype(dtype) for name in "qkv")
        tangents = {name: self.directions[name].astype(dtype) for name in names or self.inputs()}
        return _native.attention_jvp(q, k, v, tangents, self.call_options(dtype))

    def expected_jvp(self, names=None):
        """Returns the derivatives of the definition."""
        primals = [torch.from_numpy(self.arrays[name]) for name in self.inputs()]
        names = names or self.inputs()
        tangents = [
            torch.from_numpy(self.directions[name]) * (1.0 if name in names else 0.0)
            for name in self.inputs()
        ]
        call = lambda *inputs: self.dense(**dict(zip(self.inputs(), inputs, strict=True)))  # noqa: E731
        return [x.numpy() for x in torch.func.jvp(call, tuple(primals), tuple(tangents))[1]]

    def double_backward(self, dtype=np.float64, names=None, d_lse=True, wrt=None):
        """Returns the gradients of the native function."""
        cast = {name: x.astype(dtype) for name, x in self.arrays.items()}
        options = self.call_options(dtype)
        out, lse = _native.attention(cast["q"], cast["k"], cast["v"], return_lse=True, **options)
        cotangents = {name: self.directions[name].astype(dtype) for name in names or self.inputs()}
        args = (cast["do"], cast["q"], cast["k"], cast["v"], out, lse, cast["dlse"] if d_lse else None)
        wrt = wrt or [*NAMES, *(name for name in self.inputs() if name not in "qkv")]
        return _native.attention_double_backward(*args, cotangents, options, wrt)

    def expected_double_backward(self, names=None, d_lse=True):
        """Returns the gradients of the definition."""
        inputs = {name: torch.from_numpy(self.arrays[name]).requires_grad_() for name in self.inputs()}
        upstream = [torch.tensor(self.arrays[name], requires_grad=True) for name in ("do", "dlse")]
        out, lse = self.dense(**inputs)
        if not d_lse:
            with torch.no_grad():
                upstream[1].zero_()
        loss = (out * upstream[0]).sum() + (lse * upstream[1]).sum()
        first = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        names = names or self.inputs()
        directions = [
            torch.from_numpy(self.directions[name]) * (1.0 if name in names else 0.0) for name in inputs
        ]
        product = sum((x * y).sum() for x, y in zip(first, directions, strict=True))
        wanted = dict(zip(("do", "dlse"), upstream, strict=True)) | inputs
        second = torch.autograd.grad(product, list(wanted.values()), allow_unused=True)
        found = zip(wanted.items(), second, strict=True)
        return {name: (torch.zeros_like(x) if y is None else y).numpy() for (name, x), y in found}


def _cast(name, x, dtype):
    if hasattr(x, "_lowered"):
        return x._lowered()
    is_table = isinstance(x, np.ndarray) and name in ("scale", "sinks", "alibi_slopes")
    return x.astype(dtype) if is_table else x


def assert_close(got, expected, tolerance):
    """Checks an array against another, relative to its largest element."""
    assert got.shape == expected.shape
    largest = max(np.max(np.abs(expected), initial=0.0), 1.0)
    assert np.max(np.abs(got.astype(np.float64) - expected), initial=0.0) <= tolerance * largest


def hide(*shape):
    """Returns a boolean bias that leaves some rows without a key."""
    seen = np.random.default_rng(7).random(shape) > 0.4
    seen[..., shape[-2] // 2, :] = False
    return seen


CASES = {
    "one": lambda: Case(1, 1),
    "one query": lambda: Case(1, 65),
    "plain": lambda: Case(17, 65),
    "causal": lambda: Case(65, 65, causal=True),
    "long": lambda: Case(130, 130, causal=True, dims=(20, 33)),
    "rows without keys": lambda: Case(65, 17, causal=True),
    "grouped": lambda: Case(17, 65, heads=(6, 2), dims=(16, 5)),
    "wide group": lambda: Case(3, 17, heads=(40, 1), causal=True),
    "window": lambda: Case(130, 130, window_size=(5, 3), heads=(4, 2)),
    "boolean": lambda: Case(65, 70, bias=hide(2, 1, 65, 70), heads=(4, 2)),
    "bias": lambda: Case(17, 65, bias=(2, 2, 17, 65), causal=True),
    "shared bias": lambda: Case(65, 17, bias=(1, 1, 65, 17), heads=(4, 2)),
    "bias by head": lambda: Case(17, 70, bias=(4, 1, 70), heads=(4, 2)),
    "bias by query": lambda: Case(70, 17, bias=(70, 1)),
    "one bias": lambda: Case(17, 17, bias=(1,)),
    "relative bias": lambda: Case(65, 70, relative_bias=(4, 134), heads=(4, 2), causal=True),
    "shared relative bias": lambda: Case(17, 5, relative_bias=(1, 21), bias=(17, 5)),
    "slopes": lambda: Case(17, 65, alibi_slopes=np.array([0.5, 0.1]), causal=True),
    "sinks": lambda: Case(65, 17, sinks=np.array([0.5, -1.0]), causal=True),
    "scale": lambda: Case(17, 65, scale=0.3, dims=(16, 24)),
    "scale by head": lambda: Case(17, 65, scale=np.array([[0.3], [0.7]])),
    "padding": lambda: Case(17, 65, mask=padding([40, 0]), heads=(2, 1)),
    "nothing": lambda: Case(3, 0),
}


@pytest.fixture(params=CASES)
def case(request):
    """Each case."""
    return CASES[request.param]()


@pytest.fixture(autouse=True)
def _threads(keep_num_threads):
    subquad.set_num_threads(2)


def test_jvp_float64(case):
    for got, expected in zip(case.jvp(), case.expected_jvp(), strict=True):
        assert_close(got, expected, 1e-9)


def test_double_backward_float64(case):
    expected = case.expected_double_backward()
    got = case.double_backward()
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert_close(x, expected[name], 1e-9)


def test_float32(case):
    largest = 200 * np.finfo(np.float32).eps
    for got, expected in zip(case.jvp(np.float32), case.expected_jvp(), strict=True):
        assert got.dtype == np.float32
        assert_close(got, expected, largest)
    expected = case.expected_double_backward()
    for name, got in case.double_backward(np.float32).items():
        assert got.dtype == np.float32
        assert_close(got, expected[name], largest)


@pytest.mark.parametrize("names", [["q"], ["k"], ["v"], ["bias"], ["q", "v"]])
def test_some_directions(names):
    case = Case(17, 65, bias=(17, 65), causal=True)
    for got, expected in zip(case.jvp(names=names), case.expected_jvp(names), strict=True):
        assert_close(got, expected, 1e-9)
    expected = case.expected_double_backward(names, d_lse=False)
    for name, got in case.double_backward(names=names, d_lse=False).items():
        assert_close(got, expected[name], 1e-9)


def test_some_gradients(case):
    everything = case.double_backward()
    for name, expected in everything.items():
        (got,) = case.double_backward(wrt=[name]).values()
        assert got.tobytes() == expected.tobytes()


def test_no_direction():
    case = Case(17, 65)
    out, lse = _native.attention_jvp(*(case.arrays[name] for name in "qkv"), {"q": None}, {})
    assert not out.any()
    assert not lse.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_change_nothing(case, dtype):
    found = []
    for threads in (1, 2):
        subquad.set_num_threads(threads)
        arrays = [*case.jvp(dtype), *case.double_backward(dtype).values()]
        found.append([x.tobytes() for x in arrays])
    assert found[0] == found[1]


@pytest.mark.parametrize("hidden", [np.nan, np.inf])
def test_hidden_keys_have_no_influence(hidden):
    case = Case(17, 65, window_size=(3, 3), heads=(4, 2))
    clean = case.jvp(), case.double_backward()
    seen = case.visible().numpy().any(0)
    assert not seen.all()
    for name in "kv":
        case.arrays[name][:, ~seen] = hidden
        case.directions[name][:, ~seen] = hidden
    for got, expected in zip(case.jvp(), clean[0], strict=True):
        np.testing.assert_array_equal(got, expected)
    # The output that enters was rounded otherwise.
    for name, got in case.double_backward().items():
        assert_close(got, clean[1][name], 1e-14)


def test_a_nan_stays_where_it_is_seen():
    case = Case(65, 65, causal=True)
    clean = [*case.jvp(), *case.double_backward().values()]
    case.arrays["v"][:, 60] = np.nan
    case.directions["k"][:, 61] = np.nan
    out, lse, d_out, d_q, *_ = [*case.jvp(), *case.double_backward().values()]
    for got, expected in zip((out, d_out, d_q), (clean[0], clean[2], clean[3]), strict=True):
        assert_close(got[:, :60], expected[:, :60], 1e-14)
        assert np.isnan(got[:, 61:]).all()
    np.testing.assert_array_equal(lse[:, :, :61], clean[1][:, :, :61])


def test_tensors_and_strides():
    case = Case(17, 65)
    q, k, v = (torch.from_numpy(case.arrays[name]) for name in "qkv")
    tangents = {name: torch.from_numpy(x).mT.contiguous().mT for name, x in case.directions.items()}
    out, lse = _native.attention_jvp(q, k, v, tangents, {})
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    for got, expected in zip((out, lse), case.expected_jvp(), strict=True):
        assert_close(got.numpy(), expected, 1e-9)


def test_derivatives_of_derivatives():
    """Central differences of the first gradients along the direction are the second."""
    case = Case(5, 7, causal=True)
    q, k, v, d_out = (case.arrays[name] for name in ("q", "k", "v", "do"))
    step = 1e-5

    def gradients(sign):
        moved = [x + sign * step * case.directions[name] for name, x in zip("qkv", (q, k, v), strict=True)]
        out, lse = subquad.attention(*moved, causal=True, return_lse=True)
        args = (d_out, *moved, out, lse, case.arrays["dlse"])
        return _native.attention_backward(*args, ["q", "k", "v"], {"causal": True})

    got = case.double_backward(wrt=["q", "k", "v"])
    for name, plus, minus in zip("qkv", gradients(1), gradients(-1), strict=True):
        assert_close(got[name], (plus - minus) / (2 * step), 1e-8)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"softcap": 5.0}, "softcap"), ({"normalizer": Sigmoid()}, "normalizer")],
)
def test_what_has_no_higher_derivatives(options, name):
    case = Case(3, 4)
    case.options = options
    for call in (case.jvp, case.double_backward):
        with pytest.raises(NotImplementedError, match=f"^{name} with higher derivatives"):
            call()


def test_half_types_are_refused():
    case = Case(3, 4)
    with pytest.raises(NotImplementedError, match=r"^q: float16 with higher derivatives"):
        case.jvp(np.float16)
    with pytest.raises(NotImplementedError, match=r"^q: float16 with higher derivatives"):
        case.double_backward(np.float16, d_lse=False)


@pytest.mark.parametrize(
    ("tangents", "error", "message"),
    [
        (
            {"sinks": np.zeros(2)},
            ValueError,
            r"^tangents: expected names of q, k, v, bias, relative_bias, got ",
        ),
        ({1: np.zeros(2)}, TypeError, "'int' object"),
        (
            {"q": np.zeros((2, 3, 2, 7))},
            ValueError,
            r"^tangents\['q'\]: expected shape \(2, 3, 2, 8\) as q has",
        ),
        ({"k": np.zeros((2, 4, 2, 8), np.float32)}, TypeError, r"^tangents\['k'\]: expected dtype float64"),
        ({"v": torch.zeros(2, 4, 2, 8)}, TypeError, r"^tangents\['v'\]: expected a NumPy array as v is"),
        ({"bias": np.zeros((3, 4))}, ValueError, r"^tangents\['bias'\]: expected None, as bias is not given"),
    ],
)
def test_bad_tangents(tangents, error, message):
    case = Case(3, 4)
    with pytest.raises(error, match=message):
        _native.attention_jvp(*(case.arrays[name] for name in "qkv"), tangents, {})


@pytest.mark.parametrize(
    ("wrt", "message"),
    [
        (["q", "q"], r'^wrt: expected each name once, got "q" twice'),
        (["sinks"], r"^wrt: expected names of do, q, k, v, dlse, bias, relative_bias, got "),
        (["bias"], r"^wrt: expected names of arguments that are given, got "),
    ],
)
def test_bad_wrt(wrt, message):
    with pytest.raises(ValueError, match=message):
        Case(3, 4).double_backward(wrt=wrt)


def test_a_boolean_bias_has_no_direction():
    case = Case(3, 4, bias=np.ones((3, 4), bool))
    case.directions["bias"] = np.zeros((3, 4))
    with pytest.raises(
        ValueError, match=r"^cotangents\['bias'\]: expected None, as bias is not given as numbers"
    ):
        case.double_backward(names=["bias"])
    with pytest.raises(TypeError, match=r"^bias: expected dtype"):
        case.double_backward(wrt=["bias"])
