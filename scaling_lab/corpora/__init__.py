"""From text, local or on the Hugging Face Hub, to token files for `data=prepared`. Does not import torch."""
