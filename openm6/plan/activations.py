"""What a training step keeps of each token for its backward pass."""

# Letters: D width, Q query width H·d, G key-value width, P first product, F hidden, E experts, K choices

from __future__ import annotations

from openm6.base.config import Config
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, matrices_of


class Activations(Config):
    """Elements that a layer keeps of one token, as multiples of its sizes; a test holds them to what torch keeps.

    attention: width·D + query·Q + key_value·2G; dense: dense_width·D + hidden·F;
    experts: expert_width·D + K·(row + row_width·D + hidden·F) + router·E. `hidden` is 3 for swiglu (gate, up and their
    product) and 2 for gelu. `by_expert`: SwiGLU experts that drop nothing run one after the other, as on a processor,
    and keep K·(row + D + 2F): the rows and what the first product made of them.
    """

    width: float = 2.0
    query: float = 5.0
    key_value: float = 2.0
    dense_width: float = 2.0
    expert_width: float = 2.0
    row: float = 10.0
    row_width: float = 2.0
    router: float = 2.0
    by_expert: bool = False

    def attention_elements(self, config: BackboneConfig) -> float:
        """Of one layer's attention."""
        heads, kv_heads = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        return self.width * config.width + self.query * heads + self.key_value * kv_heads

    def feed_forward_elements(self, config: BackboneConfig, layer: int) -> float:
        """Of one layer's networks."""
        part = config.feed_forward(layer)
        hidden = part.hidden * matrices_of(part.ffn)
        if isinstance(part, DenseConfig):
            return self.dense_width * config.width + hidden
        row = self.row + self.row_width * config.width + hidden
        if self.by_expert and part.ffn == "swiglu" and part.capacity is None:
            row = self.row + config.width + 2 * part.hidden
        routed = part.choices * (part.capacity or 1.0) * row + self.router * part.num_experts
        return self.expert_width * config.width + routed + part.num_shared * hidden

    def bytes_a_token(self, config: BackboneConfig, element: int) -> float:
        """Of all layers, at `element` bytes an element."""
        return element * sum(self._elements(config, layer) for layer in range(config.num_layers))

    def largest_layer(self, config: BackboneConfig, element: int) -> float:
        """Of the layer that keeps most."""
        return element * max(self._elements(config, layer) for layer in range(config.num_layers))

    def _elements(self, config: BackboneConfig, layer: int) -> float:
        return self.attention_elements(config) + self.feed_forward_elements(config, layer)
