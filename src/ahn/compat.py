"""What differs between the versions of transformers that are supported."""

import inspect

from transformers.masking_utils import create_causal_mask

# what a cache is called among the arguments and results of a model: transformers 5.24 renamed it
PAST, OTHER_PAST = "cache", "past_key_values"
if PAST not in inspect.signature(create_causal_mask).parameters:
    PAST, OTHER_PAST = OTHER_PAST, PAST
