#!lua name=$library
--[[ The queue's state machine inside Redis: protocol_core.py, call by call, as Redis Functions.

Every change of state is one function call, so it happens whole or not at all, whoever dies. Clocks are Redis' own TIME
(a key overrides it for tests). Every function may be called again after its reply was lost: what is done is recognised.
All keys of a partition share a hash tag, so one call touches one slot.

    <p>r:<id>      hash    a request: body, facts, fingerprint, status (w, r, e), epoch, until, deliveries, deadline ...
    <p>t:<id>      string  its token log: int32, little endian, four bytes a token; STRLEN is the truth about n
    <p>f:<id>      set     channels of gateways that read it, beside the one that submitted it
    <p>q:<model>   zset    who waits: score is rank and fair share, member is arrival and id
    <p>w:<model>   zset    since when each of them waits, in ms
    <p>alarms      zset    when time alone may change a request, by ms
    <p>acct        hash    requests and tokens that wait (w) and run (r), in all, by model and by tenant; dead letters (dl)
    <p>fair        hash    virtual time and the tenants' ends in it (fair_share.py)
    <p>drain       hash    how fast the queue empties under pressure (drain_rate.py keeps the same three numbers)
    <p>over        hash    how often the first that did not fit was overtaken
    <p>l:<worker>  string  what the last lease call that found something handed out, and its nonce
    <p>workers     hash    last reports; <p>seen zset: when; <p>s:<model> zset: who serves it and when they said so
    <p>dead        stream  requests given up
    <p>epoch, <p>arrivals, <p>clock

ARGV begins with the limits, comma separated, in the order of LIMITS. Replies are {next alarm in ms or -1, now, ...}. ]]

local RANK = 2 ^ 51 -- tags are below it; (rank + 1) * RANK + tag is exact in a double
local UNITS = $units
local WINDOW_MS = $window_ms
local LIMITS = {$limits}
local FIELDS = {'status', 'model', 'tokens', 'prompt', 'score', 'place', 'epoch', 'until', 'deliveries', 'losses', 'deadline', 'cancel',
                'ended_as', 'forget', 'channel', 'shared', 'tenant', 'background', 'orphan'}
local NUMBERS = {'tokens', 'prompt', 'score', 'epoch', 'until', 'deliveries', 'losses', 'deadline', 'forget', 'orphan'}

local known_limits = {} -- by their text: every caller sends the same few

local function read_limits(text)
    local limits = known_limits[text]
    if not limits then
        limits = {}
        local i = 0
        for number in string.gmatch(text, '[^,]+') do
            i = i + 1
            limits[LIMITS[i]] = tonumber(number)
        end
        known_limits = {[text] = limits}
    end
    return limits
end

-- One call: keys, limits, time, and the news it makes.
local function open(keys, args)
    local p = keys[1]
    local c = {p = p, limits = read_limits(args[1]), news = {}, about = {}, offered = {}, known = {}}
    local fixed = redis.call('GET', p .. 'clock')
    if fixed then
        c.now = tonumber(fixed)
    else
        local time = redis.call('TIME')
        c.now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
    end
    return c
end

local function find(c, id)
    local values = redis.call('HMGET', c.p .. 'r:' .. id, unpack(FIELDS))
    if not values[1] then return nil end
    local e = {id = id}
    for i, name in ipairs(FIELDS) do e[name] = values[i] end
    for _, name in ipairs(NUMBERS) do
        e[name] = tonumber(e[name] or nil)
    end
    return e
end

local function set(c, e, ...)
    redis.call('HSET', c.p .. 'r:' .. e.id, ...)
end

local function length(c, e) return redis.call('STRLEN', c.p .. 't:' .. e.id) / 4 end

-- ---- counting ----

local function count(c, e, sign)
    for _, key in ipairs({{'r', 1}, {'t', e.tokens}}) do
        local name = e.status .. key[1]
        redis.call('HINCRBY', c.p .. 'acct', name, sign * key[2])
        if redis.call('HINCRBY', c.p .. 'acct', name .. ':' .. e.model, sign * key[2]) == 0 then
            redis.call('HDEL', c.p .. 'acct', name .. ':' .. e.model)
        end
    end
    if e.tenant and e.tenant ~= '' and redis.call('HINCRBY', c.p .. 'acct', '@' .. e.tenant, sign * e.tokens) == 0 then
        redis.call('HDEL', c.p .. 'acct', '@' .. e.tenant)
    end
end

local function totals(c)
    local found = redis.call('HMGET', c.p .. 'acct', 'wr', 'wt', 'rr', 'rt')
    return tonumber(found[1] or 0), tonumber(found[2] or 0), tonumber(found[3] or 0), tonumber(found[4] or 0)
end

-- Under pressure: somebody waits, or the queue is half full. Only then do ends say how fast work gets done.
local function note(c, ended)
    local waiting, wt, _, rt = totals(c)
    local drain = redis.call('HMGET', c.p .. 'drain', 'noted', 'pressed', 'ended')
    local elapsed = math.max(0, c.now - tonumber(drain[1] or 0))
    if waiting > 0 or 2 * (wt + rt) >= c.limits.max_queued_tokens then
        local kept = math.exp(-elapsed / WINDOW_MS)
        local pressed = tonumber(drain[2] or 0) * kept + WINDOW_MS * (1 - kept)
        redis.call('HSET', c.p .. 'drain', 'noted', c.now, 'pressed', string.format('%.17g', pressed),
                   'ended', string.format('%.17g', tonumber(drain[3] or 0) * kept + ended))
    else
        redis.call('HSET', c.p .. 'drain', 'noted', c.now)
    end
end

local function move(c, e, status)
    note(c, status == 'e' and e.tokens or 0)
    count(c, e, -1)
    e.status = status
    set(c, e, 'status', status)
    if status ~= 'e' then count(c, e, 1) end
end

-- ---- fair shares: fair_share.py ----

local function stamp(c, tenant, weight, tokens)
    local name = '@' .. tenant
    local found = redis.call('HMGET', c.p .. 'fair', 'now', 'last', name)
    local tag = math.max(tonumber(found[1] or 0), tonumber(found[3] or 0))
    local ends = tag + math.floor(tokens * UNITS / weight)
    local last = math.max(tonumber(found[2] or 0), ends)
    redis.call('HSET', c.p .. 'fair', name, string.format('%.0f', ends), 'last', string.format('%.0f', last))
    return tag
end

local function handed_out(c, e)
    local tag = e.score % RANK
    if tag > tonumber(redis.call('HGET', c.p .. 'fair', 'now') or 0) then
        redis.call('HSET', c.p .. 'fair', 'now', string.format('%.0f', tag))
    end
end

local function emptied(c)
    local found = redis.call('HMGET', c.p .. 'fair', 'now', 'last')
    local now = math.max(tonumber(found[1] or 0), tonumber(found[2] or 0))
    redis.call('DEL', c.p .. 'fair')
    redis.call('HSET', c.p .. 'fair', 'now', string.format('%.0f', now))
end

-- ---- time ----

local function due(e)
    if e.status == 'e' then return e.forget end
    local at = e.deadline
    if e.status == 'r' and (not at or e['until'] < at) then at = e['until'] end
    if e.orphan and (not at or e.orphan < at) then at = e.orphan end
    return at
end

-- The earliest alarm stands: one that goes off early finds nothing due and is set again, so renewing costs nothing here.
local function set_alarm(c, e)
    local at = due(e)
    if at then redis.call('ZADD', c.p .. 'alarms', 'LT', at, e.id) end
end

-- ---- changes of one request ----

-- News of one request, for redis.py: how long each part is, then the part; integers little endian, four bytes.
local function framed(id, first, log, terminal)
    return struct.pack('<I4', #id) .. id .. struct.pack('<I4I4', first, #log) .. log .. struct.pack('<I4', #terminal) .. terminal
end

local function tell(c, e, news)
    local channels = e.shared and redis.call('SMEMBERS', c.p .. 'f:' .. e.id) or {}
    if e.channel and e.channel ~= '' then table.insert(channels, e.channel) end
    for _, channel in ipairs(channels) do
        c.news[channel] = c.news[channel] or {}
        c.about[channel] = c.about[channel] or {}
        table.insert(c.news[channel], news)
        c.about[channel][e.id] = true
    end
end

local function offer(c, e)
    redis.call('ZADD', c.p .. 'q:' .. e.model, e.score, e.place .. e.id)
    redis.call('ZADD', c.p .. 'w:' .. e.model, c.now, e.id)
    c.offered[e.model] = true
end

local function unline(c, e)
    redis.call('ZREM', c.p .. 'q:' .. e.model, e.place .. e.id)
    redis.call('ZREM', c.p .. 'w:' .. e.model, e.id)
    redis.call('HDEL', c.p .. 'over', e.id)
    if tonumber(redis.call('HGET', c.p .. 'acct', 'wr')) <= 1 then emptied(c) end -- it is still counted
end

local function finish(c, e, terminal, ended_as)
    if e.status == 'w' then unline(c, e) end
    move(c, e, 'e')
    e.forget = c.now + (e.background and c.limits.background_ttl_ms or c.limits.log_ttl_ms)
    set(c, e, 'terminal', terminal, 'forget', e.forget, 'ended_as', ended_as or 'fenced')
    redis.call('HDEL', c.p .. 'r:' .. e.id, 'body')
    tell(c, e, framed(e.id, length(c, e), '', terminal))
    if e.shared then redis.call('DEL', c.p .. 'f:' .. e.id) end
    redis.call('ZREM', c.p .. 'alarms', e.id)
    set_alarm(c, e)
end

local function cancelled(c, e, worker_says)
    local usage, timings = {}, nil
    if worker_says then
        local said = cmsgpack.unpack(worker_says)
        usage, timings = said.usage, said.timings
    end
    return cmsgpack.pack({type = 'finished', request_id = e.id, reason = 'cancelled', timings = timings,
                          usage = {prompt_tokens = e.prompt, completion_tokens = length(c, e),
                                   cached_tokens = usage.cached_tokens or 0}})
end

local function failed(e, code, retryable, message)
    return cmsgpack.pack({type = 'failed', request_id = e.id, code = code, message = message, retryable = retryable})
end

-- A cancellation: of who waits at once, of who runs when its worker hears of it.
local function stop(c, e)
    if e.status == 'w' then
        finish(c, e, cancelled(c, e))
    elseif e.status == 'r' then
        e.cancel = '1'
        set(c, e, 'cancel', '1')
    end
end

local function hold(c, e)
    e['until'] = c.now + c.limits.lease_ms
    set(c, e, 'until', e['until'])
    if e.status == 'w' then
        unline(c, e)
        move(c, e, 'r')
        set_alarm(c, e)
    end
end

local function put_back(c, e)
    move(c, e, 'w')
    offer(c, e)
end

local function lapse(c, e)
    if e.cancel then
        finish(c, e, cancelled(c, e))
    elseif e.deliveries >= c.limits.max_deliveries then
        local message = 'given up: ' .. e.deliveries .. ' workers were lost while serving this'
        redis.call('XADD', c.p .. 'dead', 'MAXLEN', '~', 10000, '*', 'id', e.id, 'model', e.model, 'why', message)
        redis.call('HINCRBY', c.p .. 'acct', 'dl', 1)
        redis.call('HINCRBY', c.p .. 'acct', 'dl:' .. e.model, 1)
        finish(c, e, failed(e, '$lost_code', $lost_retryable, message))
    else
        e.losses = (e.losses or 0) + 1
        set(c, e, 'losses', e.losses)
        put_back(c, e)
    end
end

local function on_alarm(c, e)
    if e.status == 'e' and e.forget <= c.now then
        redis.call('DEL', c.p .. 'r:' .. e.id, c.p .. 't:' .. e.id, c.p .. 'f:' .. e.id)
        return
    end
    if e.status ~= 'e' and e.deadline and e.deadline <= c.now then
        local message = 'the deadline passed after ' .. length(c, e) .. ' tokens'
        finish(c, e, failed(e, '$deadline_code', $deadline_retryable, message), 'expired')
    elseif e.status == 'r' and e['until'] <= c.now then
        lapse(c, e)
    end
    if e.status ~= 'e' and e.orphan and e.orphan <= c.now then
        redis.call('HDEL', c.p .. 'r:' .. e.id, 'orphan')
        e.orphan = nil
        stop(c, e)
    end
    set_alarm(c, e)
end

-- Apply deadlines, lapses and forgetting that are due.
local function expire(c)
    while true do
        local ids = redis.call('ZRANGEBYSCORE', c.p .. 'alarms', '-inf', c.now, 'LIMIT', 0, 200)
        if #ids == 0 then return end
        for _, id in ipairs(ids) do
            redis.call('ZREM', c.p .. 'alarms', id)
            local e = find(c, id)
            if e then on_alarm(c, e) end
        end
    end
end

-- ---- readers ----

-- A gateway reads this no longer; whether nobody does.
local function unfollow(c, e, channel)
    if e.channel == channel then
        e.channel = ''
        set(c, e, 'channel', '')
    else
        redis.call('SREM', c.p .. 'f:' .. e.id, channel)
    end
    return e.channel == '' and redis.call('SCARD', c.p .. 'f:' .. e.id) == 0
end

-- Nobody listens on this channel: its gateway is dead, or looks at its logs again when it is back.
local function unheard(c, channel)
    for id in pairs(c.about[channel]) do
        local e = find(c, id)
        if e and e.status ~= 'e' and unfollow(c, e, channel) and not e.background then
            e.orphan = c.now + c.limits.orphan_ms
            set(c, e, 'orphan', e.orphan)
            set_alarm(c, e)
        end
    end
end

-- Tell who listens, and answer.
local function close(c, ...)
    for channel, news in pairs(c.news) do
        local heard = redis.call('PUBLISH', channel, table.concat(news))
        if heard == 0 and c.limits.orphan_ms > 0 then unheard(c, channel) end
    end
    for model in pairs(c.offered) do redis.call('PUBLISH', c.p .. 'work', model) end
    local first = redis.call('ZRANGE', c.p .. 'alarms', 0, 0, 'WITHSCORES')
    return {first[2] and math.floor(tonumber(first[2])) or -1, c.now, ...}
end

-- ---- the gateways' side ----

-- id, fingerprint, body, facts, model, tokens, prompt tokens, rank, deadline_ms or '', channel, tenant, weight, background
-- (1 or '') -> 'accepted' | 'attached' | 'conflict' | 'unserved' | 'full' or 'tenant', tokens taken, over, drain ...
local function submit(keys, args)
    local c = open(keys, args)
    expire(c)
    local id, print, body, facts, model = args[2], args[3], args[4], args[5], args[6]
    local tokens, prompt, rank, channel = tonumber(args[7]), tonumber(args[8]), tonumber(args[9]), args[11]
    local tenant, weight, background = args[12], tonumber(args[13]), args[14] ~= '' and args[14] or nil
    local known = redis.call('HGET', c.p .. 'r:' .. id, 'fingerprint')
    if known then return close(c, known == print and 'attached' or 'conflict') end
    if c.limits.refuses_unserved > 0
        and redis.call('ZCOUNT', c.p .. 's:' .. model, '(' .. c.now - c.limits.worker_ttl_ms, '+inf') == 0 then
        return close(c, 'unserved')
    end
    local _, wt, _, rt = totals(c)
    local of_all, of_tenant = wt + rt, 0
    if tenant ~= '' then of_tenant = tonumber(redis.call('HGET', c.p .. 'acct', '@' .. tenant) or 0) end
    local over_all, over_tenant = of_all + tokens - c.limits.max_queued_tokens, of_tenant + tokens - c.limits.max_tenant_tokens
    if tenant == '' then over_tenant = 0 end
    if over_all > 0 or over_tenant > 0 then
        note(c, 0)
        local drain = redis.call('HMGET', c.p .. 'drain', 'pressed', 'ended')
        local why, taken = 'tenant', of_tenant
        if over_all > 0 then why, taken = 'full', of_all end
        return close(c, why, taken, math.max(over_all, over_tenant), drain[1] or '0', drain[2] or '0')
    end
    local arrival = string.format('%013d', redis.call('INCR', c.p .. 'arrivals'))
    local e = {id = id, status = 'w', model = model, tokens = tokens, place = arrival, channel = channel, tenant = tenant,
               score = (rank + 1) * RANK + stamp(c, tenant, weight, tokens),
               deadline = args[10] ~= '' and c.now + tonumber(args[10]) or nil}
    set(c, e, 'status', 'w', 'model', model, 'tokens', tokens, 'prompt', prompt, 'place', arrival,
        'score', string.format('%.0f', e.score), 'deliveries', 0, 'fingerprint', print, 'body', body, 'facts', facts,
        'channel', channel, 'tenant', tenant)
    if e.deadline then set(c, e, 'deadline', string.format('%.0f', e.deadline)) end
    if background then set(c, e, 'background', background) end
    note(c, 0)
    count(c, e, 1)
    offer(c, e)
    set_alarm(c, e)
    return close(c, 'accepted')
end

-- id -> 'ok' | 'unknown'
local function cancel(keys, args)
    local c = open(keys, args)
    expire(c)
    local e = find(c, args[2])
    if not e then return close(c, 'unknown') end
    stop(c, e)
    return close(c, 'ok')
end

-- id, channel of the gateway that no longer reads it
local function abandon(keys, args)
    local c = open(keys, args)
    expire(c)
    local e = find(c, args[2])
    if e and e.status ~= 'e' and unfollow(c, e, args[3]) and not e.background then stop(c, e) end
    return close(c)
end

-- id -> 'ok' | 'unknown', facts, status, tokens logged, terminal or ''
local function standing(keys, args)
    local c = open(keys, args)
    expire(c)
    local found = redis.call('HMGET', c.p .. 'r:' .. args[2], 'facts', 'status', 'terminal')
    if not found[2] then return close(c, 'unknown') end
    return close(c, 'ok', found[1], found[2], length(c, {id = args[2]}), found[3] or '')
end

-- id, start, channel -> 'ok' | 'unknown', tokens from start on as bytes, terminal or ''. The channel hears of what comes.
local function follow(keys, args)
    local c = open(keys, args)
    expire(c)
    local e = find(c, args[2])
    if not e then return close(c, 'unknown') end
    if e.status ~= 'e' then
        if e.channel ~= args[4] then
            redis.call('SADD', c.p .. 'f:' .. e.id, args[4])
            if not e.shared then set(c, e, 'shared', '1') end
        end
        if e.orphan then redis.call('HDEL', c.p .. 'r:' .. e.id, 'orphan') end
    end
    local log = redis.call('GETRANGE', c.p .. 't:' .. e.id, 4 * tonumber(args[3]), -1)
    return close(c, 'ok', log, redis.call('HGET', c.p .. 'r:' .. e.id, 'terminal') or '')
end

-- How long the oldest of those who wait has waited, in ms; of one model, or of all ('').
local function oldest(c, model)
    local models, since = {model}, c.now
    if model == '' then
        models = {}
        for _, name in ipairs(redis.call('HKEYS', c.p .. 'acct')) do
            table.insert(models, string.match(name, '^wr:(.+)$'))
        end
    end
    for _, each in ipairs(models) do
        since = math.min(since, tonumber(redis.call('ZRANGE', c.p .. 'w:' .. each, 0, 0, 'WITHSCORES')[2] or c.now))
    end
    return c.now - since
end

-- model or '' -> queued requests, queued tokens, running requests, running tokens, oldest in ms, dead letters
local function depth(keys, args)
    local c = open(keys, args)
    expire(c)
    local suffix = args[2] ~= '' and ':' .. args[2] or ''
    local names = {'wr' .. suffix, 'wt' .. suffix, 'rr' .. suffix, 'rt' .. suffix, 'dl' .. suffix}
    local found = redis.call('HMGET', c.p .. 'acct', unpack(names))
    for i = 1, #names do found[i] = tonumber(found[i] or 0) end
    return close(c, found[1], found[2], found[3], found[4], oldest(c, args[2]), found[5])
end

-- ---- the workers' side ----

-- The first places of several lines as one: {score, id}, in order.
local function line(c, models, most)
    local places, seen = {}, {}
    for _, model in ipairs(models) do
        if not seen[model] then
            seen[model] = true
            local found = redis.call('ZRANGE', c.p .. 'q:' .. model, 0, most, 'WITHSCORES')
            for i = 1, #found, 2 do table.insert(places, {tonumber(found[i + 1]), found[i]}) end
        end
    end
    table.sort(places, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
    return places
end

local function is_suspect(c, losses)
    return losses >= math.max(1, c.limits.max_deliveries - 1)
end

-- waiting_line.py, pick()
local function pick(c, models, max_requests, max_tokens, capacity, takes_suspect)
    local picked, room, head, looked, overtakes = {}, max_tokens, nil, 0, c.limits.max_overtakes
    for _, place in ipairs(line(c, models, max_requests + overtakes + 1)) do
        if #picked >= max_requests then break end
        if head then
            looked = looked + 1
            if looked > overtakes or tonumber(redis.call('HGET', c.p .. 'over', head) or 0) >= overtakes then break end
        end
        local id = string.sub(place[2], 14)
        local found = redis.call('HMGET', c.p .. 'r:' .. id, 'tokens', 'losses')
        local tokens, suspect = tonumber(found[1]), is_suspect(c, tonumber(found[2] or 0))
        if takes_suspect or not suspect then
            local needed = tokens <= capacity and tokens or 0 -- what can never fit is handed out to be refused in words
            if needed <= room then
                room = room - needed
                takes_suspect = takes_suspect and not suspect
                table.insert(picked, id)
                if head then redis.call('HINCRBY', c.p .. 'over', head, 1) end
            elseif not head then
                head = id
            end
        end
    end
    return picked
end

-- A lease as the worker reads it.
local function handed(c, e, epoch, delivery)
    local log = redis.call('GET', c.p .. 't:' .. e.id) or ''
    local suspect = is_suspect(c, e.losses or 0) and 1 or 0
    return {redis.call('HGET', c.p .. 'r:' .. e.id, 'body'), epoch, log, delivery, suspect}
end

-- What the call with this nonce handed out, if it is the worker's last that did: its reply was lost. Else nil.
local function again(c, key, nonce)
    local last = redis.call('GET', key)
    last = last and cmsgpack.unpack(last)
    if not last or last[1] ~= nonce then return nil end
    local leases = {}
    for i = 2, #last, 2 do
        local e = find(c, last[i])
        if e and e.epoch == last[i + 1] and e.status ~= 'e' then
            hold(c, e)
            table.insert(leases, handed(c, e, e.epoch, e.deliveries))
        end
    end
    return leases
end

-- worker, nonce, max_requests, max_tokens, capacity_tokens, takes suspect (1 or 0), models ...
-- -> {body, epoch, token bytes, delivery, is suspect} ...
local function lease(keys, args)
    local c = open(keys, args)
    expire(c)
    local key, nonce, models = c.p .. 'l:' .. args[2], args[3], {}
    for i = 8, #args do table.insert(models, args[i]) end
    local leases = again(c, key, nonce)
    if leases then return close(c, leases) end
    leases = {}
    local handed_over = {nonce}
    local takes_suspect = args[7] == '1'
    for _, id in ipairs(pick(c, models, tonumber(args[4]), tonumber(args[5]), tonumber(args[6]), takes_suspect)) do
        local e = find(c, id)
        local epoch = redis.call('INCR', c.p .. 'epoch')
        local delivery = redis.call('HINCRBY', c.p .. 'r:' .. id, 'deliveries', 1)
        set(c, e, 'epoch', epoch)
        handed_out(c, e)
        hold(c, e)
        table.insert(leases, handed(c, e, epoch, delivery))
        table.insert(handed_over, id)
        table.insert(handed_over, epoch)
    end
    if #leases > 0 then redis.call('SET', key, cmsgpack.pack(handed_over), 'PX', 4 * c.limits.lease_ms) end
    return close(c, leases)
end

-- worker, report, is draining (1 or 0), models ...
local function report(keys, args)
    local c = open(keys, args)
    expire(c)
    local worker, ttl = args[2], c.limits.worker_ttl_ms
    for _, old in ipairs(redis.call('ZRANGEBYSCORE', c.p .. 'seen', '-inf', c.now - ttl)) do
        redis.call('ZREM', c.p .. 'seen', old)
        redis.call('HDEL', c.p .. 'workers', old)
    end
    redis.call('ZADD', c.p .. 'seen', c.now, worker)
    redis.call('HSET', c.p .. 'workers', worker, args[3])
    for i = 5, #args do
        local key = c.p .. 's:' .. args[i]
        if args[4] == '1' then redis.call('ZREM', key, worker) else redis.call('ZADD', key, c.now, worker) end
        redis.call('ZREMRANGEBYSCORE', key, '-inf', c.now - ttl)
        redis.call('PEXPIRE', key, 2 * ttl)
    end
    return close(c)
end

-- -> {report, age in ms} ...
local function workers(keys, args)
    local c = open(keys, args)
    expire(c)
    local found = {}
    local recent = redis.call('ZRANGEBYSCORE', c.p .. 'seen', '(' .. c.now - c.limits.worker_ttl_ms, '+inf', 'WITHSCORES')
    for i = 1, #recent, 2 do
        table.insert(found, {redis.call('HGET', c.p .. 'workers', recent[i]), c.now - tonumber(recent[i + 1])})
    end
    return close(c, found)
end

-- A lease's standing: nil and the request, or why it is refused.
local function stands(c, id, epoch)
    local e = find(c, id)
    if not e or e.epoch ~= epoch then return 'fenced', nil end
    return nil, e
end

-- The request as this call knows it, with the length of its log: found once, kept while the call changes it.
local function known(c, id)
    local e = c.known[id]
    if e == nil then
        e = find(c, id) or false
        if e then e.n = length(c, e) end
        c.known[id] = e
    end
    return e
end

-- The log holds less than the worker has been told it does: a failover or a power cut took the rest, or the worker has a
-- bug. The next delivery goes on where the log ends.
local function torn(c, e)
    redis.call('HDEL', c.p .. 'r:' .. e.id, 'epoch')
    e.epoch = nil
    if e.status == 'r' then
        lapse(c, e)
        set_alarm(c, e)
    end
    return 'fenced'
end

local function append(c, id, epoch, kind, first, payload, completed)
    local e = known(c, id)
    if not e or e.epoch ~= epoch then return 'fenced' end
    local n = e.n
    if e.status == 'e' then
        local is_repeat
        if kind == 't' then
            is_repeat = first + #payload / 4 <= n
        else
            is_repeat = e.cancel or redis.call('HGET', c.p .. 'r:' .. id, 'terminal') == payload
        end
        if is_repeat and e.ended_as ~= 'expired' then return nil end
        return e.ended_as
    end
    if kind == 't' then
        if e.cancel then return 'cancelled' end
        if first > n then return torn(c, e) end
        hold(c, e)
        local fresh = string.sub(payload, 4 * (n - first) + 1)
        if #fresh > 0 then
            redis.call('APPEND', c.p .. 't:' .. id, fresh)
            e.n = n + #fresh / 4
            if e.deliveries > 1 then -- what makes progress does not kill its workers
                e.deliveries = 1
                set(c, e, 'deliveries', 1)
            end
            tell(c, e, framed(id, n, fresh, ''))
        end
    elseif e.cancel and kind == 'f' then
        finish(c, e, cancelled(c, e, payload))
    elseif kind == 'f' and completed ~= n then
        return torn(c, e)
    else
        finish(c, e, payload)
    end
    return nil
end

-- {id, epoch, kind (t, f, x), first index, payload, completion tokens} ... -> refusals {id, reason, epoch} ...
local function publish(keys, args)
    local c = open(keys, args)
    expire(c)
    local refusals = {}
    for i = 2, #args, 6 do
        local epoch = tonumber(args[i + 1])
        local reason = append(c, args[i], epoch, args[i + 2], tonumber(args[i + 3]), args[i + 4], tonumber(args[i + 5]))
        if reason then table.insert(refusals, {args[i], reason, epoch}) end
    end
    return close(c, refusals)
end

-- {id, epoch} ... -> refusals
local function renew(keys, args)
    local c = open(keys, args)
    expire(c)
    local refusals = {}
    for i = 2, #args, 2 do
        local id, epoch = args[i], tonumber(args[i + 1])
        local reason, e = stands(c, id, epoch)
        if not reason then
            if e.status == 'e' then reason = e.ended_as
            elseif e.cancel then reason = 'cancelled'
            else hold(c, e) end
        end
        if reason then table.insert(refusals, {id, reason, epoch}) end
    end
    return close(c, refusals)
end

-- {id, epoch} ...: back as if this delivery had not been; tokens stay
local function release(keys, args)
    local c = open(keys, args)
    expire(c)
    for i = 2, #args, 2 do
        local reason, e = stands(c, args[i], tonumber(args[i + 1]))
        if not reason and e.status ~= 'e' then
            redis.call('HDEL', c.p .. 'r:' .. e.id, 'epoch')
            redis.call('HINCRBY', c.p .. 'r:' .. e.id, 'deliveries', -1)
            if e.cancel then finish(c, e, cancelled(c, e))
            elseif e.status == 'r' then put_back(c, e)
            else set(c, e, 'losses', e.losses - 1) end -- it had lapsed: its worker was late, and is not lost
        end
    end
    return close(c)
end

-- Apply what is due: for whoever waits for it.
local function sweep(keys, args)
    local c = open(keys, args)
    expire(c)
    return close(c)
end

-- A full Redis takes no new request; everything else goes on, or it would never be less full.
redis.register_function('$library_submit', submit)
redis.register_function{function_name = '$library_cancel', callback = cancel, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_abandon', callback = abandon, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_standing', callback = standing, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_follow', callback = follow, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_depth', callback = depth, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_lease', callback = lease, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_publish', callback = publish, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_renew', callback = renew, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_release', callback = release, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_sweep', callback = sweep, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_report', callback = report, flags = {'allow-oom'}}
redis.register_function{function_name = '$library_workers', callback = workers, flags = {'allow-oom'}}
