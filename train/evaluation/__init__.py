"""How good a model is: metrics, baselines, protocol, validation, comparison."""
