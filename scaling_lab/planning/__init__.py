"""From options to a `Plan`: sizes, recipes, designs, execution and cost estimates. Does not import torch."""
