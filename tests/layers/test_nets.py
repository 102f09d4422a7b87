"""Nets of random layers, nested and scanned, give Linen's numbers, gradients and state."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_checks import check_emitted, check_jitted, check_operations, check_report, lowered
from layer_grid import Call, filled

WIDTH = 4
Spec = tuple[Any, ...]
"""What a net is made of: a layer with its fields, or other nets put together."""


class Net(nn.Module):
    """Runs a spec on an array of shape ``[batch, length, WIDTH]``, and gives one like it."""

    spec: Spec
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind, *rest = self.spec
        if kind == "layer":
            return self._layer(x, *rest).astype(x.dtype)
        if kind == "sequence":
            for spec in rest:
                x = Net(spec, self.train)(x)
            return x
        if kind == "residual":
            return x + Net(rest[0], self.train)(x)
        if kind == "twice":
            shared = Net(rest[0], self.train)
            return shared(jnp.tanh(shared(x)))
        spec, axis, is_checkpointed = rest
        step = nn.remat(Step) if is_checkpointed else Step
        scan = nn.scan(
            step,
            variable_axes={"params": axis, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        return scan(spec, self.train)(x, None)[0]

    def _layer(self, x: jax.Array, cls: Any, fields: tuple[Any, ...], mode: str) -> jax.Array:
        flags = {
            "deterministic": not self.train,
            "use_running_average": not self.train,
        }
        names = [name for name in flags if name in cls.__dataclass_fields__]
        chosen = {name: flags[name] for name in names}
        if issubclass(cls, nn.RNNCellBase):
            return nn.RNN(cls(**dict(fields)))(x)
        if mode == "construction":
            return cls(**dict(fields), **chosen)(x)
        return cls(**dict(fields))(x, **chosen)


class Step(Net):
    """A net as the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return Net(self.spec, self.train)(x), None


_HALF = st.sampled_from([None, jnp.float32, jnp.bfloat16])
_PARAM = st.sampled_from([jnp.float32, jnp.bfloat16])
_FLAG = st.booleans()
_TYPES = {"dtype": _HALF, "param_dtype": _PARAM}
_LAYERS: dict[Any, dict[str, Any]] = {
    nn.Dense: {"features": st.just(WIDTH), "use_bias": _FLAG, **_TYPES},
    nn.DenseGeneral: {
        "features": st.just((3, WIDTH)),
        "axis": st.sampled_from([(1, 2), (-2, -1)]),
        **_TYPES,
    },
    nn.Einsum: {
        "shape": st.just((WIDTH, WIDTH)),
        "einsum_str": st.sampled_from(["...a,ab->...b", "xya,ab->xyb"]),
        "use_bias": _FLAG,
    },
    nn.Conv: {
        "features": st.just(WIDTH),
        "kernel_size": st.sampled_from([(1,), (2,), (3,)]),
        "padding": st.sampled_from(["SAME", "CIRCULAR", "CAUSAL"]),
        "feature_group_count": st.sampled_from([1, 2]),
        "kernel_dilation": st.sampled_from([1, 2]),
        **_TYPES,
    },
    nn.ConvTranspose: {
        "features": st.just(WIDTH),
        "kernel_size": st.just((2,)),
        "transpose_kernel": _FLAG,
        **_TYPES,
    },
    nn.BatchNorm: {"momentum": st.sampled_from([0.9, 0.5]), "use_scale": _FLAG, **_TYPES},
    nn.LayerNorm: {"use_bias": _FLAG, "reduction_axes": st.sampled_from([-1, (1, 2)]), **_TYPES},
    nn.RMSNorm: {"use_scale": _FLAG, **_TYPES},
    nn.GroupNorm: {"num_groups": st.sampled_from([1, 2, 4]), "use_bias": _FLAG, **_TYPES},
    nn.InstanceNorm: {"feature_axes": st.sampled_from([-1, 2]), **_TYPES},
    nn.Dropout: {
        "rate": st.sampled_from([0.0, 0.5, 1.0]),
        "broadcast_dims": st.sampled_from([(), (0,)]),
    },
    nn.PReLU: {"param_dtype": _PARAM},
    nn.MultiHeadDotProductAttention: {
        "num_heads": st.sampled_from([1, 2]),
        "dropout_rate": st.sampled_from([0.0, 0.5]),
        "normalize_qk": _FLAG,
        **_TYPES,
    },
    nn.LSTMCell: {"features": st.just(WIDTH)},
    nn.OptimizedLSTMCell: {"features": st.just(WIDTH)},
    nn.SimpleCell: {"features": st.just(WIDTH), "residual": _FLAG},
    nn.GRUCell: {"features": st.just(WIDTH)},
}


def _layer(cls: Any) -> Any:
    values = st.fixed_dictionaries({}, optional=_LAYERS[cls])
    needed = {name: _LAYERS[cls][name] for name in _NEEDED if name in _LAYERS[cls]}
    both = st.tuples(st.fixed_dictionaries(needed), values)
    fields = both.map(lambda pair: tuple(sorted({**pair[1], **pair[0]}.items())))
    return st.tuples(
        st.just("layer"), st.just(cls), fields, st.sampled_from(["construction", "call"])
    )


_NEEDED = ("features", "kernel_size", "shape", "einsum_str", "axis", "rate", "num_heads")
_NEEDED = (*_NEEDED, "num_groups")
_ONE = st.sampled_from(list(_LAYERS)).flatmap(_layer)


def _larger(inner: Any) -> Any:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda specs: ("sequence", *specs)),
        st.tuples(st.just("residual"), inner),
        st.tuples(st.just("twice"), inner),
        st.tuples(st.just("scan"), inner, st.sampled_from([0, 1]), st.booleans()).filter(
            lambda spec: not spec[2] or not any(cls in repr(spec) for cls in ("PReLU",))
        ),
    )


_SPECS = st.recursive(_ONE, _larger, max_leaves=4)


def _call(spec: Spec, train: bool) -> Call:
    module = Net(("sequence", spec), train)
    x = jnp.asarray(np.random.default_rng(len(repr(spec))).standard_normal((2, 3, WIDTH)) * 2)
    x = x.astype(jnp.float32)
    keys = {name: jax.random.key(number) for number, name in enumerate(("params", "dropout"))}
    shapes = jax.eval_shape(module.init, keys, x)
    variables = filled(shapes, np.random.default_rng(0))
    return Call(
        module=module,
        variables=variables,
        args=(x,),
        init=(x,),
        keys={"dropout": jax.random.key(5)},
        init_keys=keys,
    )


@settings(
    max_examples=60 if os.environ.get("LINSEY_GRID") == "full" else 6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(_SPECS, st.booleans())
def test_a_net(spec: Spec, train: bool) -> None:
    call = _call(spec, train)
    program = lowered(call)
    check_report(program)
    check_emitted(call, program)
    check_operations(call, program)
    check_jitted(call, program)
