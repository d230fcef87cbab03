-- Whole answers of 4 tokens to prompts of 16, all different: wrk -t1 -c64 -d10 --latency -s bench/generate.lua URL
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"

local count = 0

request = function()
    count = count + 1
    local ids = {}
    for position = 1, 16 do ids[position] = 100 + (count * 37 + position * 11) % 1500 end
    local prompt = '{"input_ids": [' .. table.concat(ids, ",") .. ']'
    return wrk.format(nil, "/generate", nil, prompt .. ', "max_tokens": 4, "ignore_eos": true, "temperature": 0}')
end
