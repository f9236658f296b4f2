"""``lightning plan``: what a recipe needs on given devices, before anything is bought."""
