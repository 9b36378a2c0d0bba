"""Normalizer objects: what they refuse and how they are lowered. What they compute: `reference/test_modifiers.py`."""

import numpy as np
import pytest

from subquad.normalizers import Power, ReLU, Sigmoid, Softplus


def test_lowering():
    assert Sigmoid()._lowered() == ("sigmoid", 0.0)
    assert Sigmoid(-3)._lowered() == ("sigmoid", -3.0)
    assert Softplus()._lowered() == ("softplus",)
    assert Softplus(reweight=3)._lowered() == ("softplus", 3.0)
    assert ReLU()._lowered() == ("relu", 1.0, True)
    assert ReLU(2, normalize=False)._lowered() == ("relu", 2.0, False)
    assert Power(np.float32(4))._lowered() == ("power", 4.0)
    assert all(type(x) is float for x in (Sigmoid(1).bias, ReLU(2).power, Power(np.int64(2)).power))


def test_they_are_values():
    assert ReLU(2) == ReLU(2.0)
    assert ReLU(2) != ReLU(2, normalize=False)
    assert len({Softplus(), Softplus(), Power(2), Sigmoid()}) == 3
    assert repr(Sigmoid(0.5)) == "Sigmoid(bias=0.5)"
    with pytest.raises(AttributeError):
        Power(2).power = 3


@pytest.mark.parametrize(
    ("call", "exception", "pattern"),
    [
        (lambda: Sigmoid(np.inf), ValueError, r"bias: expected a finite number, got inf"),
        (lambda: Sigmoid(np.nan), ValueError, r"bias: .*nan"),
        (lambda: Sigmoid("1"), TypeError, r"bias: .*str"),
        (lambda: Sigmoid(None), TypeError, r"bias: .*NoneType"),
        (lambda: Softplus(0), ValueError, r"reweight: expected None or a finite number above 0, got 0"),
        (lambda: Softplus(np.nan), ValueError, r"reweight: .*nan"),
        (lambda: Softplus("3"), TypeError, r"reweight: .*str"),
        (lambda: ReLU(0), ValueError, r"power: expected a finite number above 0, got 0"),
        (lambda: ReLU(-1), ValueError, r"power: .*-1"),
        (lambda: ReLU(True), TypeError, r"power: .*bool"),
        (lambda: ReLU(1, normalize=1), TypeError, r"normalize: .*int"),
        (lambda: Power(0.0), ValueError, r"power: .*0"),
        (lambda: Power(np.inf), ValueError, r"power: .*inf"),
        (lambda: Power([2, 3]), TypeError, r"power: .*list"),
        (lambda: Power(np.ones(2)), TypeError, r"power: .*ndarray"),
    ],
)
def test_refused(call, exception, pattern):
    with pytest.raises(exception, match=pattern):
        call()
