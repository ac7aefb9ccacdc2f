"""The policy and its value head over one trunk."""

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from looper.lora import compute_in_base_precision
from looper.packing import ATTENTION, PLAIN, is_plain
from looper.ppo_data import Tokens
from looper.ppo_math import selective_log_softmax


class PolicyWithValue(nn.Module):
    """A LoRA policy and one linear value head on its last hidden state.

    The head's weights are zero at first; the trainer sets its bias to the mean reward.

    LoRA weights and the value head are float32, whatever the base is: an update of 1e-6 would be lost in bfloat16. Both
    compute in the base's type (NF4 in bfloat16: see looper.lora). Log-probabilities are computed in float32 from the
    hidden states. Dropout is off throughout, or the ratio would compare two different random functions.
    Raises ValueError if the adapter is not trainable, or the head of the language model is not a plain frozen one.
    """

    def __init__(self, policy: PeftModel, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.policy = policy
        compute_in_base_precision(policy)
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError("ppo: the adapter has no trainable weight; load it with is_trainable=True")
        for parameter in trainable:
            parameter.data = parameter.data.float()
        language_model = policy.get_base_model()
        if not is_plain(language_model):
            raise ValueError(f"ppo: the base is of type {language_model.config.model_type}, or has a sliding window; it "
                             f"must be one of {', '.join(PLAIN)} with full attention")
        language_model.set_attn_implementation(ATTENTION)
        head = language_model.get_output_embeddings()
        if isinstance(head, BaseTunerLayer) or head.weight.requires_grad or not head.weight.is_floating_point():
            raise ValueError("ppo: the language model's head must be neither trained nor quantised; leave lm_head out "
                             "of the LoRA target modules and of the quantisation")
        self.value_head = nn.Linear(language_model.config.get_text_config().hidden_size, 1, device=head.weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if gradient_checkpointing:
            # transformers renamed this after 5.17
            enable = getattr(language_model, "activation_checkpointing_enable", None)
            (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.train()

    def train(self, mode: bool = True) -> "PolicyWithValue":
        """Every module stays in evaluation mode, so that no kind of dropout acts; `mode` only reaches the flag that
        lets the layers checkpoint their activations."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """→ log-probabilities, values and entropies (without gradient), each [B, T] float32, zero outside the mask."""
        language_model = self.policy.get_base_model()
        trunk = getattr(language_model, language_model.base_model_prefix)
        hidden = trunk(input_ids=tokens.input_ids, position_ids=tokens.positions, rows=tokens.rows,
                       use_cache=False).last_hidden_state
        hidden = hidden[0, tokens.sources]  # [N, D]: only what predicts a response token
        head = language_model.get_output_embeddings().weight
        logprobs, entropies = selective_log_softmax(hidden.to(head.dtype), head, tokens.targets)
        values = self.value_head(hidden.float()).squeeze(-1)
        return tuple(torch.zeros(tokens.mask.shape, device=hidden.device).masked_scatter(tokens.mask, each)
                     for each in (logprobs, values, entropies))
