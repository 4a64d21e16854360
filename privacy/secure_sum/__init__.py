"""A sum over clients of which the server sees only the total, with noise that the clients add themselves.

The protocol of Bonawitz et al. 2017 (https://doi.org/10.1145/3133956.3133982, figure 4, for a server that follows it):
:mod:`~pomona.privacy.secure_sum.client` and :mod:`~pomona.privacy.secure_sum.server` answer records with records
(:mod:`~pomona.privacy.secure_sum.records`) and know no network. :mod:`~pomona.privacy.secure_sum.terms` says what is
promised, to whom, and what is not.
"""
