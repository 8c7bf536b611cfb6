"""manyeyes, the learning half: recipes, data, training, stacking, scores."""
