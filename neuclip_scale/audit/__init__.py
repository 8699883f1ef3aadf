<<<<<<< HEAD
"""What a download lacks of its published list, why, how the missing part differs, and whether it matters."""
=======
"""What a download lacks, why, and whether it matters."""
>>>>>>> audit-pictures
