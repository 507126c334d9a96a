"""Questions beyond the three approaches: tuning, known entropy, skills, learning-rate transfer."""
