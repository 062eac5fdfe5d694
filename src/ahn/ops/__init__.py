"""Operations on tensors, and the choice of their implementations; nothing here knows a layer or a cache."""
