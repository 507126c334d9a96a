"""What generated corpora share: random numbers as a function of integers, Zipf distributions, documents."""
