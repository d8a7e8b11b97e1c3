"""Conversion between text and tokens: chat templates, and the tokens of prompts and answers."""

from palate.model.codec.codec import Codec
from palate.model.codec.shown import Shown
from palate.model.codec.template import PLAIN_CHAT

__all__ = ["PLAIN_CHAT", "Codec", "Shown"]
