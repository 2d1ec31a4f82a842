"""Pictures of what the physics losses look at: tracks, scores, masks, relations, and a model's predictions beside them."""
