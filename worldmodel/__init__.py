"""The video world model and everything that trains it. No simulator in here."""
