"""Real models from PyPI, tiny and with random weights, for linsey's tests.

Nothing here is our own model code: each entry builds a class of somebody else's package from a
small configuration, without any download. ``pip install linsey[zoo]`` brings the packages;
importing this module needs only jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """One model of somebody else's, and what is needed to run it."""

    name: str
    """Unique, lower case; the id of the parametrised tests."""
    package: str
    """The distribution on PyPI that holds the model's code."""
    domain: Literal["language", "vision", "multimodal", "audio", "rl", "graph", "series"]
    """The field that the model comes from."""
    api: Literal["linen", "nnx"]
    """Which Flax API the model is written in."""
    build: Callable[[], Any]
    """Returns an unbound Linen module, or for NNX a factory ``(rngs: nnx.Rngs) -> nnx.Module``."""
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    """Returns ``(args, kwargs)`` of arrays, for init and for the call; add ``static`` to them."""
    static: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments, for init and call, that are Python values: close over them under jit."""
    init_rngs: tuple[str, ...] = ("params",)
    """The rng streams that init draws from."""
    call_rngs: tuple[str, ...] = ()
    """The rng streams that a call draws from, in train mode where the model has one."""
    mutable: tuple[str, ...] = ()
    """Linen: collections that a call changes. NNX: names of the variable types that it changes."""
    method: str | None = None
    """The method to call, ``None`` for ``__call__``."""
    traits: tuple[str, ...] = ()
    """What makes the model a hard case, one word each: ``remat``, ``vmap``, ``shared``, ``tied``…
    ``slow`` marks the two models whose eager init compiles the longest."""
    warnings: tuple[str, ...] = ()
    """``filterwarnings`` entries without which the model does not run under ``-W error``."""


def _transformers(model: str, module: str, config: Callable[[Any], Any], **fields: Any) -> Any:
    """Build the inner Linen module of a Flax model of ``transformers``."""
    owner = import_module(f"transformers.models.{model}.modeling_flax_{model}")
    return getattr(owner, module)(config(import_module("transformers")), **fields)


def _tokens(length: int = 5, batch: int = 2) -> jax.Array:
    """Token ids of shape ``(batch, length)``, all within ``[3, 10)``."""
    return jnp.arange(batch * length).reshape(batch, length) % 7 + 3


def _positions(length: int = 5, batch: int = 2) -> jax.Array:
    """Position ids of shape ``(batch, length)``."""
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


def _wave(*shape: int) -> jax.Array:
    """A float array of the given shape with values in ``[-1, 1]``."""
    size = 1
    for axis in shape:
        size *= axis
    return jnp.sin(0.7 * jnp.arange(size, dtype=jnp.float32)).reshape(shape)


def _text(*extra: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(ids, mask, *extra)``, as most text models of ``transformers`` take them."""
    return (_tokens(), jnp.ones((2, 5), int), *extra), {}


_BERT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
_SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
_TRAIN: dict[str, Any] = {"deterministic": False}
_DROPOUT: dict[str, Any] = {"init_rngs": ("params", "dropout"), "call_rngs": ("dropout",)}


def _s5() -> Any:
    """S5 sequence classifier: a module in a field, and one more made by a partial."""
    from functools import partial

    from long_range_models import ContinuousSequenceModel, S4Module, S5Layer

    layer = partial(S5Layer, state_dim=8, conj_sym=True)
    return ContinuousSequenceModel(S4Module(8, 2, layer), out_dim=3, pool=True)


def _nano_moe() -> Any:
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    sizes = {"vocab_size": 32, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 32}
    return NanoMoE(NanoMoEConfig(**sizes, n_experts=3, block_size=8))


def _vae() -> Any:
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    channels = {"in_channels": 8, "out_channels": 8, "latent_channels": 4}
    return FlaxAutoencoderKL(**channels, block_out_channels=(8,), norm_num_groups=4)


def _stylegan2_mapping() -> Any:
    """The mapping network of StyleGAN2: each layer carries a PRNG key array as a field."""
    from flaxmodels.stylegan2 import MappingNetwork

    return MappingNetwork(z_dim=8, w_dim=8, layer_features=8, num_ws=4, num_layers=2)


def _evo_transformer() -> Any:
    import_module("evosax.algorithms")  # first, or evosax imports itself in a circle
    from evosax.learned_evolution.evotf_tools import EvoTransformer

    sizes = {"embed_dim": 8, "num_heads": 2, "num_latents": 2, "latent_dim": 8}
    return EvoTransformer(
        **sizes,
        dropout_prob=0.1,
        use_fitness_encoder=False,
        use_dist_encoder=False,
        use_crossd_encoder=False,
    )


def _mamba2() -> Any:
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        state_size=8,
        head_dim=8,
        chunk_size=4,
        num_hidden_layers=2,
    )
    return lambda rngs: Mamba2ForCausalLM(config, rngs=rngs)


def _gat() -> Any:
    from jraphx.nn.models import GAT

    return lambda rngs: GAT(
        4, 8, 2, 3, dropout_rate=0.2, norm="batch_norm", jk="cat", heads=2, rngs=rngs
    )


def _actor_critic() -> Any:
    from nnx_ppo.networks.factories import make_mlp_actor_critic

    return lambda rngs: make_mlp_actor_critic(5, 2, [8, 8], [8, 8], rngs)


def _timesfm() -> Any:
    from timesfm.configs import TransformerConfig
    from timesfm.flax.transformer import Transformer

    config = TransformerConfig(
        model_dims=16,
        hidden_dims=16,
        num_heads=2,
        attention_norm="rms",
        feedforward_norm="rms",
        qk_norm="rms",
        use_bias=False,
        use_rotary_position_embeddings=True,
        ff_activation="swish",
        fuse_qkv=False,
    )
    return lambda rngs: Transformer(config, rngs=rngs)


ZOO: tuple[ZooModel, ...] = (
    ZooModel(
        name="bert",
        package="transformers",
        domain="language",
        api="linen",
        build=lambda: _transformers(
            "bert",
            "FlaxBertForMaskedLMModule",
            lambda hf: hf.BertConfig(**_BERT),
            gradient_checkpointing=True,
        ),
        inputs=lambda: _text(jnp.zeros((2, 5), int), _positions(), None),
        static=_TRAIN,
        **_DROPOUT,
        traits=("remat", "tied"),
    ),
    ZooModel(
        name="albert",
        package="transformers",
        domain="language",
        api="linen",
        build=lambda: _transformers(
            "albert",
            "FlaxAlbertForMaskedLMModule",
            lambda hf: hf.AlbertConfig(**_BERT, embedding_size=8, hidden_dropout_prob=0.1),
        ),
        inputs=lambda: _text(jnp.zeros((2, 5), int), _positions()),
        static=_TRAIN,
        **_DROPOUT,
        traits=("shared", "tied"),
    ),
    ZooModel(
        name="gpt2",
        package="transformers",
        domain="language",
        api="linen",
        build=lambda: _transformers(
            "gpt2",
            "FlaxGPT2LMHeadModule",
            lambda hf: hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16),
        ),
        inputs=lambda: _text(_positions()),
        static=_TRAIN,
        **_DROPOUT,
        traits=("tied",),
    ),
    ZooModel(
        name="llama_decode",
        package="transformers",
        domain="language",
        api="linen",
        build=lambda: _transformers(
            "llama",
            "FlaxLlamaForCausalLMModule",
            lambda hf: hf.LlamaConfig(**_BERT, num_key_value_heads=1),
        ),
        inputs=lambda: _text(_positions()),
        static={"init_cache": True},
        mutable=("cache",),
        traits=("cache",),
    ),
    ZooModel(
        name="bart",
        package="transformers",
        domain="language",
        api="linen",
        build=lambda: _transformers(
            "bart",
            "FlaxBartForConditionalGenerationModule",
            lambda hf: hf.BartConfig(**_SEQ2SEQ, max_position_embeddings=16),
        ),
        inputs=lambda: _text(*_text()[0], _positions(), _positions()),
        static=_TRAIN,
        **_DROPOUT,
        traits=("shared", "tied"),
    ),
    ZooModel(
        name="nano_moe",
        package="nano-moe-jax",
        domain="language",
        api="linen",
        build=_nano_moe,
        inputs=lambda: ((_tokens(),), {}),
        static=_TRAIN,
        **_DROPOUT,
        traits=("experts",),
    ),
    ZooModel(
        name="s5",
        package="long-range-models",
        domain="series",
        api="linen",
        build=_s5,
        inputs=lambda: ((_wave(2, 6, 3),), {}),
        traits=("lambda", "partial", "module_field", "complex"),
    ),
    ZooModel(
        name="clip",
        package="transformers",
        domain="multimodal",
        api="linen",
        build=lambda: _transformers(
            "clip",
            "FlaxCLIPModule",
            lambda hf: hf.CLIPConfig(
                text_config=_BERT | {"attention_dropout": 0.1, "eos_token_id": 2},
                vision_config=_VIT | {"attention_dropout": 0.1},
                projection_dim=8,
            ),
        ),
        inputs=lambda: (
            (_tokens(), _wave(2, 16, 16, 3), jnp.ones((2, 5), int), _positions()),
            {},
        ),
        static=_TRAIN,
        **_DROPOUT,
    ),
    ZooModel(
        name="beit",
        package="transformers",
        domain="vision",
        api="linen",
        build=lambda: _transformers(
            "beit",
            "FlaxBeitForImageClassificationModule",
            lambda hf: hf.BeitConfig(
                **_VIT,
                use_relative_position_bias=True,
                hidden_dropout_prob=0.1,
                drop_path_rate=0.5,
            ),
        ),
        inputs=lambda: ((_wave(2, 16, 16, 3),), {}),
        static=_TRAIN,
        init_rngs=("params", "dropout", "droppath"),
        call_rngs=("dropout", "droppath"),
        traits=("rngs",),
    ),
    ZooModel(
        name="resnet",
        package="transformers",
        domain="vision",
        api="linen",
        build=lambda: _transformers(
            "resnet",
            "FlaxResNetForImageClassificationModule",
            lambda hf: hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"
            ),
        ),
        inputs=lambda: ((_wave(2, 16, 16, 3),), {}),
        static=_TRAIN,
        mutable=("batch_stats",),
        traits=("batch_stats",),
    ),
    ZooModel(
        name="vae",
        package="diffusers",
        domain="vision",
        api="linen",
        build=_vae,
        inputs=lambda: ((_wave(1, 8, 4, 4),), {}),
        static={"sample_posterior": True},
        init_rngs=("params", "gaussian"),
        call_rngs=("gaussian",),
        traits=("multiple_inheritance", "rngs"),
    ),
    ZooModel(
        name="stylegan2_mapping",
        package="flaxmodels",
        domain="vision",
        api="linen",
        build=_stylegan2_mapping,
        inputs=lambda: ((_wave(2, 8),), {}),
        mutable=("moving_stats",),
        traits=("array_field", "collections"),
    ),
    ZooModel(
        name="wav2vec2",
        package="transformers",
        domain="audio",
        api="linen",
        build=lambda: _transformers(
            "wav2vec2",
            "FlaxWav2Vec2ForPreTrainingModule",
            lambda hf: hf.Wav2Vec2Config(
                **_BERT,
                conv_dim=(8, 8),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                do_stable_layer_norm=True,
                feat_extract_norm="layer",
                codevector_dim=8,
                proj_codevector_dim=8,
                num_codevectors_per_group=4,
            ),
        ),
        inputs=lambda: ((_wave(2, 200), jnp.ones((2, 200), int)), {}),
        static=_TRAIN,
        init_rngs=("params", "dropout", "gumbel"),
        call_rngs=("dropout", "gumbel"),
        traits=("rngs", "slow"),
    ),
    ZooModel(
        name="whisper",
        package="transformers",
        domain="audio",
        api="linen",
        build=lambda: _transformers(
            "whisper",
            "FlaxWhisperForConditionalGenerationModule",
            lambda hf: hf.WhisperConfig(
                **_SEQ2SEQ,
                dropout=0.1,
                num_mel_bins=8,
                max_source_positions=8,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
            gradient_checkpointing=True,
        ),
        inputs=lambda: ((_wave(2, 8, 16), *_text(_positions())[0]), {}),
        static=_TRAIN,
        **_DROPOUT,
        traits=("remat", "tied"),
    ),
    ZooModel(
        name="evo_transformer",
        package="evosax",
        domain="rl",
        api="linen",
        build=_evo_transformer,
        inputs=lambda: ((_wave(1, 2, 4, 3, 5), _wave(1, 2, 4, 6), _wave(1, 2, 3, 7)), {}),
        static={"train": True},
        **_DROPOUT,
        traits=("vmap", "partial", "slow"),
    ),
    ZooModel(
        name="mamba2",
        package="mamba2-jax",
        domain="language",
        api="nnx",
        build=_mamba2,
        inputs=lambda: ((_tokens(6),), {}),
        traits=("tied",),
    ),
    ZooModel(
        name="gat",
        package="jraphx",
        domain="graph",
        api="nnx",
        build=_gat,
        inputs=lambda: ((_wave(4, 4), jnp.array([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])), {}),
        init_rngs=("params", "dropout"),
        call_rngs=("dropout",),
        mutable=("BatchStat", "RngCount"),
        traits=("batch_stats",),
    ),
    ZooModel(
        name="actor_critic",
        package="nnx-ppo",
        domain="rl",
        api="nnx",
        build=_actor_critic,
        inputs=lambda: (
            ([(), {"action": [(), (), (), ()], "value": [(), (), ()]}], _wave(3, 5)),
            {},
        ),
        init_rngs=("params", "default"),
        call_rngs=("default",),
        mutable=("RngCount",),
        traits=("variable_type", "rngs"),
    ),
    ZooModel(
        name="timesfm",
        package="timesfm",
        domain="series",
        api="nnx",
        build=_timesfm,
        inputs=lambda: ((_wave(2, 4, 16), jnp.zeros((2, 4), bool)), {}),
    ),
)
