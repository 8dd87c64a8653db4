"""verl's V1 trainer of main_ppo with HPD: trainer, worker, agent loop and its manager."""
