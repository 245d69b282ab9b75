"""MAR (arXiv 2406.11838): a masked encoder and decoder over continuous tokens with a diffusion head per token.

specs/mar.md sections 3, 4 and 8. Tokens lie in generation order: token j of a sample is the one at grid place
order[j]; the first m are masked and the rest are visible, so that every selection is a slice. The decoder sees all
tokens and has them in raster order. Axes: B batch, L tokens, V visible rows, P buffer places, C channels of a token,
D width, W width of the head.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import Conv3, RelativeBias, filtered, layer_norm, placed_condition, stack

Array = jax.Array
SIZES = ("num_tokens", "channels", "cond_vocab", "buffer", "width", "depth", "heads", "head_width", "head_depth")
PREDICTIONS = ("noise", "velocity")
FREQUENCIES = 128  # of the head's time embedding


@dataclasses.dataclass(frozen=True)
class MarConfig:
    """Static sizes; encoder and decoder have the same."""

    num_tokens: int  # L
    channels: int  # C
    cond_vocab: int  # rows of the condition table, null condition included
    cond_length: int = 1  # condition tokens: 1 for a class, L for captions
    buffer: int = 64  # P, places for the condition, which is repeated to fill them
    width: int = 768
    depth: int = 12  # blocks of each
    heads: int = 12
    mlp_ratio: float = 4.0
    head_width: int = 1024
    head_depth: int = 6
    prediction: str = "noise"  # of the head's first C outputs, of `PREDICTIONS`; published: noise
    dropout: float = 0.1  # in training, in every block
    pooled_width: int = 0  # MLP over the whole condition, added to the tokens by their places; 0 = none, as published
    pooled_maps: int = 16  # learned spatial maps through which that MLP addresses places
    # What the decoder knows of a token's surroundings beside its place; published: nothing.
    conv_stem: bool = False  # a 3x3 convolution over its input
    relative_bias: bool = False  # attention knows the offset between cells
    local_mixing: bool = False  # a depthwise 3x3 filter in every block
    remat: bool = False
    unroll: int = 1  # blocks that one turn of the loop over blocks holds
    dtype: str = "float32"  # of the blocks; norms, softmax and head are float32

    def __post_init__(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.buffer % self.cond_length:
            raise ValueError(f"buffer {self.buffer} is not a multiple of the {self.cond_length} condition tokens")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1)")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        for name, bound in {"pooled_width": 0, "pooled_maps": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {bound}")
        for name in ("conv_stem", "relative_bias", "local_mixing"):
            if getattr(self, name) and self.side**2 != self.num_tokens:
                raise ValueError(f"{name} needs a square grid; num_tokens {self.num_tokens} is none")

    @property
    def side(self) -> int:
        """Side of the token grid."""
        return math.isqrt(self.num_tokens)


class Mar(nn.Module):
    """Backbone and head; parameters of a stack of blocks have a leading axis of blocks.

    Our choices: the null condition is a row of the condition's table; a caption's tokens share the places of the
    buffer, each repeated equally often (published: a class fills them all); an optional MLP over the pooled condition
    and, in the decoder, an optional 3x3 stem, filters and relative attention biases, as in `models.maskgit`.
    """

    config: MarConfig

    def setup(self):
        c = self.config
        dtype, init, linear = jnp.dtype(c.dtype), nn.initializers.normal(0.02), nn.initializers.xavier_uniform()
        self.conditions = nn.Embed(c.cond_vocab, c.width, embedding_init=init)
        self.mask = self.param("mask", init, (c.width,))
        places = c.buffer + c.num_tokens
        self.encoder_places = self.param("encoder_places", init, (places, c.width))
        self.decoder_places = self.param("decoder_places", init, (places, c.width))
        self.head_places = self.param("head_places", init, (c.num_tokens, c.width))
        self.tokens_in = nn.Dense(c.width, kernel_init=linear)
        self.norm_in, self.encoder_norm, self.decoder_norm = (layer_norm(None) for _ in range(3))
        self.encoder = Stack(c, name="encoder_blocks")
        self.decoder = Stack(c, local=True, name="decoder_blocks")
        if c.conv_stem:
            self.stem = Conv3(c.width, dtype)
        if c.pooled_width:
            self.pool_norm = layer_norm(None)
            self.pool = [nn.Dense(c.pooled_width) for _ in range(2)]
            self.pool_out = nn.Dense(c.pooled_maps * c.width)
            self.pool_maps = self.param("pool_maps", nn.initializers.normal(0.5), (c.num_tokens, c.pooled_maps))
        self.decoder_in = nn.Dense(c.width, dtype=dtype, kernel_init=linear)
        self.denoiser = DiffusionHead(c.channels, c.head_width, c.head_depth, c.remat)

    def __call__(self, tokens_BLC: Array, order_BL: Array, cond: Array) -> Array:
        """Every parameter once, for initialisation: head output [B,L,2C] with all tokens masked."""
        masked = jnp.full((len(tokens_BLC),), tokens_BLC.shape[1])
        z_BLD = self.backbone(tokens_BLC, order_BL, cond, masked)
        return self.denoise(tokens_BLC, jnp.zeros(z_BLD.shape[:-1], jnp.int32), self.head_condition(z_BLD))

    def backbone(
        self, tokens_BVC: Array, order_BL: Array, cond: Array, masked: int | Array, train: bool = False
    ) -> Array:
        """Condition of the head for every token, z [B,L,D] float32, in generation order.

        Args:
          tokens_BVC: the last V tokens in generation order, which hold all visible ones; V may be 0.
          order_BL: grid places in generation order, int32, a permutation of each row.
          cond: int32 [B] or [B, condition tokens].
          masked: m, the number of tokens not visible: of all samples, or int32 [B]. At least L - V; rows of
            `tokens_BVC` before it are not looked at.
          train: whether to drop out, with the rng `dropout`.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, rows = tokens_BVC.shape[:2]
        text_BLD = self.conditions(cond.reshape(batch, c.cond_length))
        buffer_BPD = jnp.repeat(text_BLD, c.buffer // c.cond_length, axis=1)
        hidden = c.num_tokens - rows
        text_places_PD, places_LD = self.encoder_places[: c.buffer], self.encoder_places[c.buffer :]
        places_BVD = places_LD[order_BL[:, hidden:]]
        decoder_BLD = self.decoder_places[None, c.buffer :]
        if c.pooled_width:
            said_BLD = placed_condition(self.pool_norm, self.pool, self.pool_out, self.pool_maps, text_BLD)
            places_BVD = places_BVD + jnp.take_along_axis(said_BLD, order_BL[:, hidden:, None], axis=1)
            decoder_BLD = decoder_BLD + said_BLD
        x_BVD = self.tokens_in(tokens_BVC) + places_BVD
        x_BSD = jnp.concatenate([buffer_BPD + text_places_PD[None], x_BVD], axis=1)
        masked_B = jnp.broadcast_to(jnp.asarray(masked, jnp.int32), (batch,))
        seen_BV = jnp.arange(hidden, c.num_tokens)[None] >= masked_B[:, None]
        # Exact slices need no mask of keys.
        exact = isinstance(masked, int) and masked == hidden
        keys_BS = None if exact else jnp.pad(seen_BV, ((0, 0), (c.buffer, 0)), constant_values=True)
        x_BSD = self.encoder_norm(self.encoder(self.norm_in(x_BSD).astype(dtype), keys_BS, train))
        x_BSD = self.decoder_in(x_BSD.astype(dtype)).astype(jnp.float32)
        seen_BVD = jnp.where(seen_BV[..., None], x_BSD[:, c.buffer :], self.mask[None, None])
        hidden_BMD = jnp.broadcast_to(self.mask[None, None], (batch, hidden, c.width))
        inverse_BL = jnp.argsort(order_BL, axis=1)
        grid_BLD = reordered(jnp.concatenate([hidden_BMD, seen_BVD], axis=1), inverse_BL, order_BL)
        if c.conv_stem:
            cells = grid_BLD.reshape(batch, c.side, c.side, c.width)
            grid_BLD = grid_BLD + self.stem(cells.astype(dtype)).reshape(grid_BLD.shape).astype(jnp.float32)
        said_BPD = x_BSD[:, : c.buffer] + self.decoder_places[None, : c.buffer]
        x_BSD = jnp.concatenate([grid_BLD + decoder_BLD, said_BPD], axis=1)
        x_BSD = self.decoder_norm(self.decoder(x_BSD.astype(dtype), None, train))
        z_BLD = x_BSD[:, : c.num_tokens] + self.head_places[None]
        return reordered(z_BLD, order_BL, inverse_BL)

    def head_condition(self, z: Array) -> Array:
        """What the head reads of z [..., D], once for all its calls: float32 [..., W]."""
        return self.denoiser.condition(z)

    def denoise(self, state: Array, timestep: Array, condition: Array) -> Array:
        """Head output [..., 2C] float32 of x_t [..., C], integer t [...] or [] and `head_condition` [..., W].

        The first C are what `prediction` says, the rest the share of the variance.
        """
        return self.denoiser(state, timestep, condition)


@jax.custom_vjp
def reordered(x_BLD: Array, order_BL: Array, inverse_BL: Array) -> Array:
    """Row j of the result is row order[j]; with the inverse its gradient is a gather too, which is faster to add up."""
    return jnp.take_along_axis(x_BLD, order_BL[..., None], axis=1)


def _reordered(x_BLD, order_BL, inverse_BL):
    return reordered(x_BLD, order_BL, inverse_BL), (order_BL, inverse_BL)


def _reordered_back(orders, grad_BLD):
    return reordered(grad_BLD, *orders[::-1]), None, None


reordered.defvjp(_reordered, _reordered_back)


class Stack(nn.Module):
    """Blocks in a loop, their parameters stacked.

    local: whether the first L tokens are the grid, so that a block may know a token's surroundings.
    """

    config: MarConfig
    local: bool = False

    @nn.compact
    def __call__(self, x_BSD: Array, keys_BS: Array | None, train: bool) -> Array:
        c = self.config
        options = {"in_axes": nn.broadcast, "split_rngs": {"dropout": True}, "unroll": c.unroll}
        loop = stack(Block, c.depth, remat=c.remat, static=(3,), **options)
        return loop(c, self.local, name="blocks")(x_BSD, keys_BS, train)[0]


class Block(nn.Module):
    """Pre-norm ViT block with the exact GELU; a step of `nn.scan`."""

    config: MarConfig
    local: bool = False

    @nn.compact
    def __call__(self, x_BSD: Array, keys_BS: Array | None, train: bool) -> tuple[Array, None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        drop = nn.Dropout(c.dropout, deterministic=not train)
        batch, length, width = x_BSD.shape

        def dense(features, name):
            return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)

        if self.local and c.local_mixing:
            x_BSD = x_BSD + filtered(x_BSD, c.side, "local")
        bias = RelativeBias(c.heads, c.side, length, name="bias")() if self.local and c.relative_bias else None
        qkv = dense(3 * width, "qkv")(layer_norm("norm_attention")(x_BSD))
        query, key, value = jnp.split(qkv.reshape(batch, length, 3 * c.heads, width // c.heads), 3, axis=2)
        mask = None if keys_BS is None else keys_BS[:, None, None]
        if train and c.dropout:
            weights = nn.dot_product_attention_weights(
                query, key, bias, mask, dropout_rng=self.make_rng("dropout"), dropout_rate=c.dropout,
                broadcast_dropout=False, deterministic=False, force_fp32_for_softmax=True,
            )  # fmt: skip
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        else:
            mixed = jax.nn.dot_product_attention(query, key, value, bias, mask)
        x_BSD = x_BSD + drop(dense(width, "out")(mixed.reshape(x_BSD.shape)))
        hidden = dense(round(c.mlp_ratio * width), "mlp_in")(layer_norm("norm_mlp")(x_BSD))
        return x_BSD + drop(dense(width, "mlp_out")(drop(nn.gelu(hidden, approximate=False)))), None


class DiffusionHead(nn.Module):
    """MLP with adaptive layer norm that denoises one token; rows are independent; float32 throughout."""

    channels: int
    width: int
    depth: int
    remat: bool = False

    def setup(self):
        linear = nn.initializers.xavier_uniform()
        zero, near = nn.initializers.zeros, nn.initializers.normal(0.02)
        self.time_in, self.time_out = (nn.Dense(self.width, kernel_init=near) for _ in range(2))
        self.condition = nn.Dense(self.width, kernel_init=linear)
        self.state_in = nn.Dense(self.width, kernel_init=linear)
        self.norms = [layer_norm(None) for _ in range(self.depth)]
        self.modulations = [nn.Dense(3 * self.width, kernel_init=zero) for _ in range(self.depth)]
        self.hidden = [nn.Dense(self.width, kernel_init=linear) for _ in range(self.depth)]
        self.out = [nn.Dense(self.width, kernel_init=linear) for _ in range(self.depth)]
        self.last_norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
        self.last_modulation = nn.Dense(2 * self.width, kernel_init=zero)
        self.last = nn.Dense(2 * self.channels, kernel_init=zero)

    def __call__(self, state: Array, timestep: Array, condition: Array) -> Array:
        frequencies = jnp.exp(-math.log(1e4) * jnp.arange(FREQUENCIES) / FREQUENCIES)
        angles = timestep[..., None].astype(jnp.float32) * frequencies.reshape((1,) * timestep.ndim + (-1,))
        time = nn.silu(self.time_in(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)))
        time = self.time_out(time)
        y = nn.silu(condition + jnp.expand_dims(time, range(condition.ndim - time.ndim)))
        x = self.state_in(state)
        block = nn.remat(DiffusionHead.block, static_argnums=(1,)) if self.remat else DiffusionHead.block
        for index in range(self.depth):
            x = block(self, index, x, y)
        shift, scale = jnp.split(self.last_modulation(y), 2, axis=-1)
        return self.last(self.last_norm(x) * (1 + scale) + shift)

    def block(self, index: int, x: Array, y: Array) -> Array:
        """One of `depth` residual blocks, of state x and condition y [..., W]."""
        shift, scale, gate = jnp.split(self.modulations[index](y), 3, axis=-1)
        return x + gate * self.out[index](nn.silu(self.hidden[index](self.norms[index](x) * (1 + scale) + shift)))
