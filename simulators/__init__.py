"""Event sources: logged impressions, their replay with delayed feedback, and a synthetic world with known truth."""
