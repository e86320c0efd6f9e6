"""The search: work items, candidates, cost model, log, store."""
