"""How far a compressed cache moves a model's predictions, decoded through the cache."""
