"""The command line: the only zone that imports hydra. Arguments become typed settings here, and stop being configs."""
