"""What a download lacks, why, and whether it matters."""
