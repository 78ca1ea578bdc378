"""Models that answer by a rule that a test writes down, and a tokenizer with a token per byte."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 258  # bytes, a beginning and an end


def byte_tokenizer():
    """Return a tokenizer that puts ``<s>`` before a text and has a token for each of its bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        BPE({"<s>": 0, "</s>": 1} | {x: index + 2 for index, x in enumerate(letters)}, [])
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def byte_llama(layers=2, **options):
    """Return a small Llama with random weights that reads bytes."""
    torch.manual_seed(0)
    given = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        bos_token_id=0,
        eos_token_id=1,
        **{**given, **options},
    )
    return LlamaForCausalLM(config).eval()


class Oracle(nn.Module):
    """A language model that knows what comes next.

    Args:
        rule: The text so far -> what comes next; its first byte is the likeliest token.
        tokenizer: Of :func:`byte_tokenizer`.
    """

    def __init__(self, rule, tokenizer):
        super().__init__()
        self.rule, self.tokenizer = rule, tokenizer
        self.embedding = nn.Embedding(VOCABULARY, 1)
        self.config = SimpleNamespace(max_position_embeddings=None)
        self.generation_config = GenerationConfig(eos_token_id=1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, use_cache=False, attention_mask=None):
        assert attention_mask is None or attention_mask.all()
        before = torch.empty(len(input_ids), 0, dtype=torch.long)
        before = before if past_key_values is None else past_key_values
        whole = torch.cat([before, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, tokens in enumerate(whole.tolist()):
            for place in range(input_ids.shape[1]):
                text = self.tokenizer.decode(tokens[: before.shape[1] + place + 1])
                text = text.removeprefix("<s>")
                following = self.tokenizer(self.rule(text), add_special_tokens=False).input_ids
                logits[row, place, following[0]] = 20.0
        return SimpleNamespace(logits=logits, past_key_values=whole if use_cache else None)

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        assert attention_mask.all()
        assert not do_sample
        for _ in range(max_new_tokens):
            best = [self(row[None, -1:], past_key_values=row[None, :-1]) for row in input_ids]
            new = torch.stack([result.logits[0, -1].argmax() for result in best])
            input_ids = torch.cat([input_ids, new[:, None]], 1)
        return input_ids
