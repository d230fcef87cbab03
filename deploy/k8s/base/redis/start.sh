#!/bin/sh
# The access list holds the password's digest, made here so that the password itself is in its Secret only.
set -eu
password=$(printf %s "${REDIS_PASSWORD:?}" | sha256sum | cut -d ' ' -f 1)
sed "s/@PASSWORD@/#$password/" /etc/redis/users.acl > /run/redis/users.acl
exec redis-server /etc/redis/redis.conf
