"""What a training step keeps of each token for its backward pass."""

# Letters: D width, Q query width H·d, G key-value width, P first product, F hidden, E experts, K choices

from __future__ import annotations

from openm6.base.config import Config
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig


class Activations(Config):
    """Elements that a layer keeps of one token, as multiples of its sizes; `openm6 bench machine` measures them anew.

    attention: width·D + query·Q + key_value·2G; dense: dense_width·D + dense_hidden·F;
    experts: expert_width·D + K·(row_width·D + row_hidden·F) + router·E. A hidden unit of swiglu counts twice.
    """

    width: float = 2.0
    query: float = 4.0
    key_value: float = 3.0
    dense_width: float = 2.0
    dense_hidden: float = 2.0
    expert_width: float = 3.0
    row_width: float = 2.0
    row_hidden: float = 2.0
    router: float = 2.0

    def attention_elements(self, config: BackboneConfig) -> float:
        heads, kv_heads = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        return self.width * config.width + self.query * heads + self.key_value * kv_heads

    def feed_forward_elements(self, config: BackboneConfig, layer: int) -> float:
        part = config.feed_forward(layer)
        hidden = part.hidden * (2 if part.ffn == "swiglu" else 1)
        if isinstance(part, DenseConfig):
            return self.dense_width * config.width + self.dense_hidden * hidden
        row = self.row_width * config.width + self.row_hidden * hidden
        shared = part.num_shared * self.dense_hidden * hidden
        routed = part.choices * (part.capacity or 1.0) * row + self.router * part.num_experts
        return self.expert_width * config.width + routed + shared

    def bytes_a_token(self, config: BackboneConfig, element: int) -> float:
        """Of all layers, at `element` bytes an element."""
        return element * sum(
            self.attention_elements(config) + self.feed_forward_elements(config, layer)
            for layer in range(config.num_layers)
        )

    def largest_layer(self, config: BackboneConfig, element: int) -> float:
        """Of the layer that keeps most."""
        return element * max(
            self.attention_elements(config) + self.feed_forward_elements(config, layer)
            for layer in range(config.num_layers)
        )
