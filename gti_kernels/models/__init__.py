"""Small reference models and data for the certificate."""
