"""Online DPO: rounds of sample, score, pair, train; the new weights go into the running engines (paper, section 4.2).

One Ray Train group and a few vLLM workers live through all rounds. Rank 0 asks the engines (`engines`, `rollout`)
while the other ranks wait; pairs are made by pure functions (`pairing`); `rounds` is the loop. Every half of a round is
on disk, whole, before the next begins (`state`), and after each training the engines must say of fixed texts what the
trainer says (`proof`).
"""
