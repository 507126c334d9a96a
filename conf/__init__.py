"""Config groups, one folder each. This file makes the folder a package, so that it is included in the wheel."""
