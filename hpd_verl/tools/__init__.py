"""Commands around a run, which the method never imports: generation, rewards, export, plan, report."""
