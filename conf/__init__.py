"""The configuration groups, one folder each. This file makes the folder a package, so that a wheel carries it."""
