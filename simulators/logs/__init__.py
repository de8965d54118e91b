"""Reading logged impressions: schema file, SQL, blocks."""
