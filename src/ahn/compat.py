"""Differences between the supported versions of transformers."""

import inspect

from transformers.masking_utils import create_causal_mask

# name of the cache among the arguments and results of a model; transformers 5.24 renamed it
PAST, OTHER_PAST = "cache", "past_key_values"
if PAST not in inspect.signature(create_causal_mask).parameters:
    PAST, OTHER_PAST = OTHER_PAST, PAST
