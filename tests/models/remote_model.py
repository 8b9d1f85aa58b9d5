"""A made-up MoE model as remote code: own names, own blocks. Tests copy this file beside a checkpoint.

kind ``bank``: stacks of all experts in a module called with (hidden_states, ids, weights); ``loop``: a ModuleList that
the block's forward loops over; ``method``: a ModuleList behind a method of the block.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BazaarConfig(PretrainedConfig):
    model_type = "bazaar"

    def __init__(self, kind="loop", vocab_size=96, width=64, inner=40, stalls=8, chosen=2, depth=2, **kwargs):
        self.kind, self.vocab_size, self.width, self.inner = kind, vocab_size, width, inner
        self.stalls, self.chosen, self.depth = stalls, chosen, depth
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class Stall(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_gate = nn.Linear(config.width, config.inner, bias=False)
        self.w_up = nn.Linear(config.width, config.inner, bias=False)
        self.w_down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x):
        return self.w_down(nn.functional.silu(self.w_gate(x)) * self.w_up(x))


class Bank(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(config.stalls, 2 * config.inner, config.width))
        self.w_out = nn.Parameter(torch.empty(config.stalls, config.width, config.inner))

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for stall in ids.unique().tolist():
            row, slot = torch.where(ids == stall)
            gate, up = nn.functional.linear(hidden[row], self.w_in[stall]).chunk(2, dim=-1)
            y = nn.functional.linear(nn.functional.silu(gate) * up, self.w_out[stall])
            out = out.index_add(0, row, y * weights[row, slot, None])
        return out


class Market(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind, self.chosen = config.kind, config.chosen
        self.clerk = nn.Linear(config.width, config.stalls, bias=False)
        stalls = [] if config.kind == "bank" else [Stall(config) for _ in range(config.stalls)]
        self.stalls = nn.ModuleList(stalls) if stalls else Bank(config)

    def trade(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for number, stall in enumerate(self.stalls):
            row, slot = torch.where(ids == number)
            if len(row):
                out = out.index_add(0, row, stall(hidden[row]) * weights[row, slot, None])
        return out

    def forward(self, x):
        hidden = x.reshape(-1, x.shape[-1])
        weights, ids = self.clerk(hidden).softmax(-1).topk(self.chosen, dim=-1)
        out = self.stalls(hidden, ids, weights) if self.kind == "bank" else self.trade(hidden, ids, weights)
        return out.view(x.shape)


class Street(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.market = Market(config)

    def forward(self, x):
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.q_proj(mean)
        return x + self.market(self.norm(x))


class BazaarPreTrainedModel(PreTrainedModel):
    config_class = BazaarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False


class BazaarModel(BazaarPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.streets = nn.ModuleList(Street(config) for _ in range(config.depth))
        self.post_init()

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for street in self.streets:
            x = street(x)
        return x


class BazaarForCausalLM(BazaarPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = BazaarModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
