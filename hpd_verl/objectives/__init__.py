"""Objectives: from log-probs of student and teacher to weights of the student's log-likelihood. Pure torch."""
