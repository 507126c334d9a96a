"""From text, local or on the Hugging Face hub, to token files that `data=prepared` trains on. No torch."""
