"""What a download lacks of its published list, why, how the missing part differs, and whether it matters."""
