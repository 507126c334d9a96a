"""The Hydra plugins of scaling_lab; installed as `hydra_plugins.scaling_lab`, where Hydra looks for them."""
