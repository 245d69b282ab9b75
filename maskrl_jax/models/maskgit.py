"""MaskGIT's bidirectional transformer over image tokens and condition tokens."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import Block, Conv3, RelativeBias, layer_norm, placed_condition

Array = jax.Array
SIZES = ("num_tokens", "codebook_size", "cond_vocab", "cond_length", "width", "depth", "heads", "mlp_width")


@dataclasses.dataclass(frozen=True)
class MaskGITConfig:
    """Static sizes. Vocabulary rows: codes 0..K-1, MASK = K, then the condition's own table."""

    num_tokens: int  # N, a square number
    codebook_size: int  # K
    cond_vocab: int  # rows of the condition table, null condition included
    cond_length: int  # condition tokens in the sequence: L for captions, 1 for a class
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int = 512
    conv_stem: bool = True
    pooled_width: int = 256  # MLP over the whole condition, added to the image tokens; 0 = none
    pooled_maps: int = 16  # learned spatial maps through which that MLP addresses places
    relative_bias: bool = True  # attention knows the offset between cells
    local_mixing: bool = True  # a depthwise 3x3 filter in every block
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        least = dict.fromkeys(SIZES, 1) | {"pooled_width": 0, "pooled_maps": min(self.pooled_width, 1)}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {bound}")
        if round(self.num_tokens**0.5) ** 2 != self.num_tokens:
            raise ValueError(f"num_tokens {self.num_tokens} is not a square grid")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")

    @property
    def mask_id(self) -> int:
        return self.codebook_size


class MaskGIT(nn.Module):
    """Masked-token transformer (arXiv 2202.04200): form A's pre-norm blocks, condition tokens last.

    Our choices: an untied head of K classes (MASK can never be drawn); the tanh form of GELU and 1e-6 in the
    layer norms (form A: the exact erf form, 1e-5); a 3x3 stem, depthwise filters and relative attention
    biases, each optional, that show a token its surroundings; and an optional MLP over the pooled condition
    (text-to-image models add one beside their text tokens): attention alone takes far longer to bind words
    to objects here.
    """

    config: MaskGITConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        init = nn.initializers.normal(0.02)
        self.tokens = nn.Embed(c.codebook_size + 1, c.width, embedding_init=init)
        self.conditions = nn.Embed(c.cond_vocab, c.width, embedding_init=init)
        self.position = self.param("position", init, (c.num_tokens + c.cond_length, c.width))
        if c.conv_stem:
            self.stem = Conv3(c.width, dtype)
        if c.pooled_width:
            self.pool_norm = layer_norm(None)
            self.pool = [nn.Dense(c.pooled_width) for _ in range(2)]
            self.pool_out = nn.Dense(c.pooled_maps * c.width)
            self.pool_maps = self.param("pool_maps", nn.initializers.normal(0.5), (c.num_tokens, c.pooled_maps))
        block = nn.remat(Block) if c.remat else Block
        side = round(c.num_tokens**0.5)
        self.blocks = [block(c.heads, c.mlp_width, side * c.local_mixing, dtype) for _ in range(c.depth)]
        if c.relative_bias:
            self.bias = [RelativeBias(c.heads, side, c.num_tokens + c.cond_length) for _ in range(c.depth)]
        self.norm = layer_norm(None)
        self.head = nn.Dense(c.codebook_size, dtype=jnp.float32)

    def __call__(self, ids_BN: Array, cond: Array) -> Array:
        """Logits [B,N,K] float32 from ids [B,N] int32 (MASK = K) and cond [B,L] or [B] int32."""
        return self.logits(self.features(ids_BN, cond))

    def features(self, ids_BN: Array, cond: Array) -> Array:
        """Output of the last norm at the image tokens, [B,N,D] float32."""
        c = self.config
        batch, num_tokens = ids_BN.shape
        side = round(num_tokens**0.5)
        image = self.tokens(ids_BN)
        if c.conv_stem:
            grid = self.stem(image.reshape(batch, side, side, c.width))
            image = image + grid.reshape(batch, num_tokens, c.width)
        text = self.conditions(cond.reshape(batch, c.cond_length))
        if c.pooled_width:
            image = image + placed_condition(self.pool_norm, self.pool, self.pool_out, self.pool_maps, text)
        x_BSD = jnp.concatenate([image, text], axis=1) + self.position[None]
        x_BSD = x_BSD.astype(c.dtype)
        for depth, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, self.bias[depth]() if c.relative_bias else None)
        return self.norm(x_BSD[:, :num_tokens])

    def controls(self, ids: Array, positions: Array) -> Array:
        """What a token and its place look like before any mixing, [b,n,D]: what a feature shortcut reads."""
        return self.tokens(ids) + self.position[positions]

    def logits(self, features: Array) -> Array:
        """Head on features [..., D] -> logits [..., K] float32."""
        return self.head(features)
